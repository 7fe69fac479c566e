"""Adapters at work: freshly made ones add zero, and are no test subject."""

import peft
import torch


def adapted(model, seed: int = 3, task_type: str = "CAUSAL_LM", **options) -> peft.PeftModel:
    """`model` with LoRA on PEFT's default targets, in eval mode, its matrices drawn by `seed`."""
    return drawn(peft.get_peft_model(model, peft.LoraConfig(task_type=task_type, **options)).eval(), seed)


@torch.no_grad()
def drawn(model, seed: int, adapter: str = "default"):
    """Draw what one LoRA adapter holds anew, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and adapter in name.split("."):
            parameter.normal_(std=0.1, generator=generator)
    return model


def train(model, ids, steps: int = 4) -> list[float]:
    """Some steps on one batch; leaves the last gradients. Returns the losses."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def one_by_one(model, ids) -> torch.Tensor:
    """The logits (B, T, V) of one token at a time."""
    cache, steps = None, []
    for token in ids.split(1, dim=1):
        out = model(token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    return torch.cat(steps, 1)
