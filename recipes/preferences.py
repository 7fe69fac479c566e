"""What the preference recipes share: the arguments of LoRA, and how often a model finds the better answer likelier."""

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from peft import LoraConfig
from recipe import RecipeArguments


@dataclass
class PreferenceArguments(RecipeArguments):
    """The arguments of every preference recipe; by default their pairs are made from a set that pip installs."""

    data: list[str] = field(
        default_factory=lambda: ["chatterbot_pairs"],
        metadata={"help": "Files (JSONL, JSON, YAML, CSV, Parquet), or chatterbot_pairs, dpo_en, kto_en."},
    )
    held_out: float = field(default=0.05, metadata={"help": "Share of the rows that is kept for evaluation."})
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA pairs beside the projections, not the model."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the pairs."})
    lora_alpha: float = field(default=32, metadata={"help": "The pairs' product counts alpha / r times."})

    def adapter(self, **options) -> LoraConfig | None:
        return LoraConfig(r=self.lora_r, lora_alpha=self.lora_alpha, **options) if self.use_peft else None


@torch.no_grad()
def preference_scores(model, tokenizer, pairs: Dataset) -> dict[str, float]:
    """Return how a model ranks pairs of answers by their log-probability a token, given the prompt.

    `preference_accuracy` is the share of pairs whose chosen answer has the larger one, `preference_margin` the mean
    difference in nats.
    """
    training = model.training
    model.eval()
    margins = []
    for row in pairs:
        chosen, rejected = (_loss(model, tokenizer, row["prompt"], row[column]) for column in ("chosen", "rejected"))
        margins.append(rejected - chosen)
    model.train(training)
    margins = torch.stack(margins)
    return {"preference_accuracy": (margins > 0).float().mean().item(), "preference_margin": margins.mean().item()}


def _loss(model, tokenizer, prompt: str | list, answer: str | list) -> torch.Tensor:
    """The mean cross-entropy of the answer's tokens."""
    if isinstance(prompt, str):
        start, whole = tokenizer([prompt, prompt + answer])["input_ids"]
    else:
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(prompt + answer, return_dict=False)
    ids = torch.tensor([whole], device=model.device)  # (1, T)
    labels = ids.clone()
    labels[:, : len(start)] = -100
    return model(input_ids=ids, labels=labels).loss
