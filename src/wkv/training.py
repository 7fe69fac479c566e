"""Faithful RWKV training with any trainer: parameter groups, learning-rate schedule, L2Wrap.

Everything plugs into `transformers.Trainer`, and what derives from it, in one line:

    from wkv.training import l2wrap_loss, optimizers
    Trainer(model, args, train_dataset=data, optimizers=optimizers(model, lr=6e-4, total_steps=1000),
            compute_loss_func=l2wrap_loss)

The per-tensor initialisation is in the model classes (`from_config`). Source: BlinkDL's RWKV-LM trainer, described in
its README.

Letters: B batch, T tokens, V vocabulary; f final learning rate over peak; p progress in [0, 1].
"""

import ctypes
import math
import sys
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from wkv.models.rwkv_loss import DeferredLogits

BETAS = (0.9, 0.99)
EPSILON = 1e-18
# The decay and the bonus learn faster, by generation under different names: ending of the name, group, factor.
FAST = (
    ("w_lora.lora.2.bias", "decay", 2.0),
    ("time_decay", "decay", 2.0),
    ("time_first", "bonus", 3.0),
)
L2WRAP_FACTOR = 1e-4
WARMUP_FLOOR = 0.01

# Of malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.1) -> list[dict]:
    """Return the groups of the official trainer, as an optimizer takes them; frozen parameters are left out.

    `decay` (RWKV-7's w0, `time_decay` before) has twice the learning rate and `bonus` (`time_first`, where there is
    one) three times, both no weight decay. `matrices` (embedding, head, projections: every `.weight` with two
    dimensions larger than one, outside the low-rank pairs) have weight decay. `rest` (token-shift mixes, low-rank
    pairs, norms, biases) has neither. Each group has the key `name`; an empty one is left out.
    """
    groups = {
        "matrices": {"params": [], "lr": lr, "weight_decay": weight_decay},
        **{name: {"params": [], "lr": factor * lr, "weight_decay": 0.0} for _, name, factor in FAST},
        "rest": {"params": [], "lr": lr, "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_group_of(name, parameter)]["params"].append(parameter)
    filled = [{"name": name, **group} for name, group in groups.items() if group["params"]]
    if not filled:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad=True: nothing to train")
    return filled


def _group_of(name: str, parameter: Tensor) -> str:
    for ending, group, _ in FAST:
        if name.endswith(ending):
            return group
    is_matrix = sum(size > 1 for size in parameter.shape) >= 2
    return "matrices" if is_matrix and ".weight" in name and "_lora.lora." not in name else "rest"


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int = 10, final_ratio: float = 0.1) -> float:
    """Return the learning rate of optimizer step `step` (from 0) over its peak.

    Linear from 1 % over `warmup_steps`, then cosine to `final_ratio` at `total_steps`: (1 + f)/2 + (1 - f)/2 cos(pi p).
    """
    progress = min(1.0, max(0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))
    cosine = (1 + final_ratio) / 2 + (1 - final_ratio) / 2 * math.cos(math.pi * progress)
    warmup = WARMUP_FLOOR + (1 - WARMUP_FLOOR) * step / warmup_steps if step < warmup_steps else 1.0
    return warmup * cosine


def optimizers(
    model: nn.Module,
    lr: float,
    total_steps: int,
    weight_decay: float = 0.1,
    warmup_steps: int = 10,
    final_ratio: float = 0.1,
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """Return AdamW and its schedule as the official trainer sets them, for `Trainer(optimizers=...)`.

    `total_steps` counts optimizer steps (after gradient accumulation). The gradient is clipped by the trainer, at
    norm 1.0 by default there as in the official one. Raises ValueError when nothing is trainable or `total_steps <=
    warmup_steps`.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps must be at least 0 and below total_steps={total_steps}, got {warmup_steps}")
    groups = parameter_groups(model, lr, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=EPSILON, fused=True)
    schedule = partial(
        learning_rate_factor, total_steps=total_steps, warmup_steps=warmup_steps, final_ratio=final_ratio
    )
    return optimizer, LambdaLR(optimizer, schedule)


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, so that the next training step need not ask for it page by page.

    For programs, at their start: short steps in bfloat16 become about a fifth faster on a CPU. Memory once used is not
    handed back to the system, and its peak grows by about a tenth. Returns False, and does nothing, without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, -1) == 1


def l2wrap_loss(
    outputs, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None, shift_labels: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy whose gradient also pulls every token's largest logit towards zero (L2Wrap).

    For `Trainer(compute_loss_func=...)`. `outputs.logits` (B, T, V), which a model of ours need not make for it;
    `labels` (B, T), shifted here unless `shift_labels` are given instead, -100 is not counted. The value is the
    cross-entropy alone; the gradient gains `1e-4 / n * max_logit` at the arg-max of each of the n counted tokens, times
    the incoming gradient, so loss scaling and accumulation scale both alike. n is `num_items_in_batch` when given (all
    micro-batches of one step).
    """
    if isinstance(outputs.logits, DeferredLogits) and outputs.logits.values is None:
        return outputs.logits.loss(labels, num_items_in_batch, shift_labels=shift_labels, pull=L2WRAP_FACTOR)
    logits = outputs.logits.flatten(0, 1).float()  # (B * T, V)
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if shift_labels is None else shift_labels
    targets = targets.flatten().to(logits.device)  # (B * T,)
    counted = targets != -100
    n = counted.sum() if num_items_in_batch is None else num_items_in_batch
    if isinstance(n, Tensor):
        n = n.to(logits.device)
    cross_entropy = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / n
    largest = logits.max(dim=-1).values * counted  # (B * T,)
    pull = L2WRAP_FACTOR / 2 * largest.square().sum() / n
    return cross_entropy + (pull - pull.detach())
