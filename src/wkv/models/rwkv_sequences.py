"""Which tokens of a batch belong together: padding, packed documents, token shift, slices of long prompts.

Also the checks of a forward's inputs.

Glossary: B batch, T time, C channels.
"""

from typing import NamedTuple

import torch
from transformers.utils import is_torchdynamo_compiling

from .rwkv_cache import check_cache


class SequencePlan(NamedTuple):
    """Which tokens belong together in a batch with padding or packed documents; all None for plain rows.

    `mask` (B, T) is False at padding; of single tokens it is all there is. `source` (B, T) and `last` (B,)
    index the tensor [carried state, zeros, tokens] along time: the predecessor of every token, and the last token of a
    row. `cu_seqlens` (n + 1,) are the bounds of the packed documents in the flattened (B * T) batch, `first` and
    `final` (B,) the documents a row begins and ends with.
    """

    mask: torch.Tensor | None = None
    source: torch.Tensor | None = None
    last: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    first: torch.Tensor | None = None
    final: torch.Tensor | None = None


# Tokens of a batch that run together where no gradient is wanted: some 100 KB each in a model of 1.5 B parameters, and
# matrix products get no faster with more of them.
SLICE_TOKENS = 4096


def plan_sequences(tokens, mask, position_ids=None, continues=False, cu_seq_lens_q=None, seq_idx=None):
    """Build the SequencePlan of a forward from whatever the caller gave to describe padding and packing.

    `tokens` are ids (B, T) or embeddings (B, T, C); `mask` (B, T) or None; `position_ids` (B, T) restarting at 0,
    `cu_seq_lens_q` (n + 1,) with B = 1, or `seq_idx` (B, T) describe packed documents. `continues` says that a cache
    holds earlier tokens; then `position_ids` do not mark packing. Raises `ValueError` when a shape does not fit.
    """
    B, T = tokens.shape[:2]
    starts = document_starts(tokens, mask, position_ids, continues, cu_seq_lens_q, seq_idx)
    if mask is None and starts is None:
        return SequencePlan()
    valid = torch.ones(B, T, dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
    # Whether the mask hides anything a GPU is not asked, which it would have to answer for every token.
    if T == 1 and starts is None:
        return SequencePlan(valid)
    # Time index + 2: 0 is the carried state, 1 the zeros before a document.
    index = torch.arange(2, T + 2, device=valid.device).expand(B, T)
    newest = torch.where(valid, index, 0).cummax(1).values
    before = torch.cat([torch.zeros_like(newest[:, :1]), newest[:, :-1]], 1)
    plan = SequencePlan(None if mask is None else valid, before, newest[:, -1])
    if starts is None:
        return plan
    document = torch.where(starts, index, 0).cummax(1).values
    plan = plan._replace(
        source=torch.where(before >= document, before, 1),
        last=torch.where(newest[:, -1] >= document[:, -1], newest[:, -1], 1),
    )
    if cu_seq_lens_q is not None:
        first = torch.zeros(1, dtype=torch.long, device=valid.device)
        return plan._replace(cu_seqlens=cu_seq_lens_q, first=first, final=first + cu_seq_lens_q.shape[0] - 2)
    starts = starts.clone()
    starts[:, 0] = True
    bounds = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([B * T], device=starts.device)])
    per_row = starts.sum(1)
    final = per_row.cumsum(0) - 1
    return plan._replace(cu_seqlens=bounds, first=final - per_row + 1, final=final)


def document_starts(tokens, mask, position_ids, continues, cu_seq_lens_q, seq_idx):
    """Where documents begin inside the rows, (B, T) bool; None if nowhere. A row's first token never begins one."""
    B, T = tokens.shape[:2]
    if cu_seq_lens_q is not None:
        if B != 1:
            raise ValueError(f"cu_seq_lens_q describes one packed row, the batch has {B} rows")
        starts = torch.zeros(1, T + 1, dtype=torch.bool, device=tokens.device)
        starts[0, cu_seq_lens_q.long()] = True
        starts[0, 0] = False
        return starts[:, :T]
    if seq_idx is not None:
        if seq_idx.shape != (B, T):
            raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}, the tokens have {(B, T)}")
        # Padding may have an index of its own: each real token is compared with the real one before it.
        real = torch.ones_like(seq_idx, dtype=torch.bool) if mask is None else mask.bool()
        newest = torch.where(real, torch.arange(T, device=real.device), -1).cummax(1).values
        before = torch.cat([torch.full_like(newest[:, :1], -1), newest[:, :-1]], 1)
        starts = real & (before >= 0) & (seq_idx != seq_idx.gather(1, before.clamp(min=0)))
    elif position_ids is not None and position_ids.ndim == 2 and T > 1 and not continues:
        # The first real token of a row begins nothing: padding to its left may be numbered 0 as well.
        position_ids = position_ids.expand(B, T)
        real = torch.ones_like(position_ids) if mask is None else mask.long()
        starts = (position_ids == 0) & (real == 1) & (real.cumsum(1) > 1)
    else:
        return None
    if is_torchdynamo_compiling():
        message = "packed documents inside a compiled graph must be described by cu_seq_lens_q"
        torch._assert_async(starts.logical_not().all(), message)
        return None
    return starts if bool(starts.any()) else None


def token_shift(x, carried, plan: SequencePlan):
    """The predecessor of every token, and the last token of every row.

    x (B, T, C); carried (B, C), the last token before this call, or None for zeros. Returns (B, T, C) and (B, C). Of
    packed documents that all go on from states, carried is (n, C) for one row, and so is what is returned for `last`.
    """
    carried = torch.zeros_like(x[:, 0]) if carried is None else carried.to(x.dtype)
    if plan.source is None:
        return torch.cat([carried.unsqueeze(1), x[:, :-1]], 1), last_token(x, carried, plan)
    padded = torch.cat([carried.unflatten(0, (x.shape[0], -1)), torch.zeros_like(x[:, :1]), x], 1)
    rows = torch.arange(x.shape[0], device=x.device)
    return padded[rows.unsqueeze(1), plan.source], padded[rows, plan.last]


def last_token(x, carried, plan: SequencePlan):
    """The last token (B, C) of plain rows; of single tokens, the carried one (B, C) where they are padding."""
    if plan.mask is None:
        return x[:, -1]
    return torch.where(plan.mask, x[:, -1], 0 if carried is None else carried.to(x.dtype))


def run_operator(op, rows, S, plan: SequencePlan, state_shape, initial=None):
    """`op(*rows, S, cu_seqlens)`, a WKV operator, over rows (B, T, ...) that may hold packed documents.

    S (B, *state_shape) or None; a decay (1, 1, ...) that all tokens share may be among the rows. `initial`
    (*state_shape) is the state that every text begins with, None for zeros. Returns the output (B, T, ...) and the
    state after the last document of each row.
    """
    B, T = rows[-1].shape[:2]
    if plan.cu_seqlens is None:
        if S is None and initial is not None:
            S = initial.expand(B, *state_shape)
        return op(*rows, S, None)
    if initial is None:
        initial = torch.zeros(state_shape, dtype=torch.float32, device=rows[-1].device)
    states = initial.expand(plan.cu_seqlens.shape[0] - 1, *state_shape)
    if S is not None:
        states = states.index_copy(0, plan.first, S)
    row = (x.reshape(1, B * T, *x.shape[2:]) if x.shape[:2] == (B, T) else x for x in rows)
    o, states = op(*row, states, plan.cu_seqlens)
    return o.view(B, T, *o.shape[2:]), states[plan.final]


def runs_in_slices(tokens, plan: SequencePlan, blocks) -> bool:
    """Whether a batch of ids or embeddings is long, nobody differentiates or watches the blocks, and rows are plain."""
    B, T = tokens.shape[:2]
    return (
        not is_torchdynamo_compiling()
        and B * T > SLICE_TOKENS
        and T > 1
        and not torch.is_grad_enabled()
        and plan.cu_seqlens is None
        and not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)
    )


def run_slices(run, tokens, mask, keep: int):
    """One slice of time after the other through `run(tokens, plan)`, which carries the state, in constant memory.

    `tokens` are ids (B, T) or embeddings (B, T, C), `mask` (B, T) or None. Returns what `run` made of the last `keep`
    tokens, 0 for all.
    """
    B, T = tokens.shape[:2]
    length, first = max(1, SLICE_TOKENS // B), T - (keep or T)
    kept = []
    for begin in range(0, T, length):
        real = None if mask is None else mask[:, begin : begin + length]
        if real is not None and bool(real.all()):
            real = None
        part = tokens[:, begin : begin + length]
        out = run(part, plan_sequences(part, real))
        if begin + length > first:
            kept.append(out[:, max(0, first - begin) :])
    return torch.cat(kept, 1)


def check_inputs(
    config, embeddings, input_ids, inputs_embeds, attention_mask, position_ids, cu_seq_lens_q, past_key_values
):
    """Raise `ValueError` for what would otherwise fail far away or pass unnoticed; shapes as in the models' forward."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    name, tokens = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    width = () if inputs_embeds is None else (config.hidden_size,)
    if tokens.ndim < 2 or tokens.shape[1] == 0 or tuple(tokens.shape[2:]) != width:
        expected = ", ".join(map(str, ("B", "T", *width)))
        raise ValueError(f"{name} must be ({expected}) with at least one token, got shape {tuple(tokens.shape)}")
    if input_ids is not None and input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids must be integers, got {input_ids.dtype}")
    weights = embeddings.weight.device
    # Accelerate keeps offloaded weights on the meta device between calls.
    if (weights.type == "meta") != (tokens.device.type == "meta") and not hasattr(embeddings, "_hf_hook"):
        raise ValueError(f"{name} are on device {tokens.device}, the model is on {weights}")
    B, T = tokens.shape[:2]
    check_cache(config, past_key_values, B)
    if isinstance(attention_mask, torch.Tensor) and not is_torchdynamo_compiling():
        rows, length = attention_mask.shape if attention_mask.ndim == 2 else (None, None)
        continues = past_key_values is not None and past_key_values.has_previous_state(0, 0)
        if rows != B or length < T or (not continues and length != T):
            expected = f"({B}, {T})"
            if continues:
                expected += f" or ({B}, {int(past_key_values.get_seq_length()) + T})"
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected {expected}")
    if position_ids is not None and tuple(position_ids.shape) not in ((B, T), (1, T)):
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}, expected {(B, T)}")
    if cu_seq_lens_q is not None and not is_torchdynamo_compiling():
        bounds = cu_seq_lens_q.tolist()
        if bounds[0] != 0 or bounds[-1] != T or bounds != sorted(bounds):
            raise ValueError(f"cu_seq_lens_q must rise from 0 to the number of tokens, {T}; got {bounds}")
    if input_ids is not None and input_ids.device.type == "cpu" and not is_torchdynamo_compiling():
        low, high = (int(x) for x in input_ids.aminmax())
        if low < 0 or high >= config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} is outside of the vocabulary, 0 to {config.vocab_size - 1}")
