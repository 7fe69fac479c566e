"""Training on texts of any length, in the memory of a short one: rows run in segments that hand their state on.

    from wkv.long_context import ConsecutiveRows, LongContextMixin

    class LongTrainer(LongContextMixin, Trainer):
        pass

    LongTrainer(model, args, train_dataset=data, segment_length=1024)

It goes before any trainer whose loss is the language model's, `trl.SFTTrainer` too; adapters and tuned states train as
they do there. `gradient_segments` says through how many segments gradients flow back:

- None: all of a row. Loss and gradients are those of one long pass, up to rounding. A segment is computed twice, and
  the states between segments are kept.
- n: then the state is cut off from what made it (truncated back-propagation through time), and the memory does not
  depend on the length at all. With n = 1 nothing is computed twice; several processes can train only so.

A text may be longer than a row: where the first of a row's `position_ids` is not 0, the row goes on with the state that
the same row of the batch before it ended in, without its gradient. `ConsecutiveRows` cuts texts so. The state is saved
with every checkpoint, and a resumed run continues with it.

Letters: B rows, T tokens of a row, L layers.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutput

from wkv.models.rwkv_cache import carried_cache, packed_states
from wkv.models.rwkv_loss import without_logits
from wkv.models.rwkv_sequences import document_starts

IGNORED = -100
# What a row of `ConsecutiveRows` holds, each (T,), and what it is padded with.
PADDING = {"input_ids": 0, "labels": IGNORED, "shift_labels": IGNORED, "position_ids": 0, "attention_mask": 0}


class LongContextMixin:
    """A Trainer that runs every row in segments of `segment_length` tokens; see the head of this file.

    Raises ValueError with gradient checkpointing, which the segments replace, with label smoothing, with gradients
    through several segments in several processes, with truncated ones under DeepSpeed, for rows of different length in
    the processes, and where a row continues a text whose state is not at hand.
    """

    def __init__(self, *args, segment_length: int, gradient_segments: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if segment_length < 1 or (gradient_segments is not None and gradient_segments < 1):
            raise ValueError(f"no segments of {segment_length} tokens, or no gradients through {gradient_segments}")
        for name in ("gradient_checkpointing", "label_smoothing_factor"):
            if getattr(self.args, name):
                raise ValueError(f"{type(self).__name__} does without {name}={getattr(self.args, name)}: leave it out")
        if isinstance(self.train_dataset, ConsecutiveRows) and self.args.train_sampling_strategy != "sequential":
            raise ValueError("ConsecutiveRows come in order: set train_sampling_strategy='sequential'")
        if self.is_deepspeed_enabled and gradient_segments is not None:
            raise ValueError("DeepSpeed steps after every backward pass: leave gradient_segments out, or use DDP")
        self.segment_length, self.gradient_segments = segment_length, gradient_segments
        self.segment_loss, self.compute_loss_func = self.compute_loss_func, None
        # By training or not: the state that the last rows ended in, and the position of the token that follows.
        self.carried: dict[bool, tuple[Tensor, Tensor]] = {}

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As the trainer's, once for each stretch of the rows that gradients flow back through."""
        row = prepare(inputs)
        row["num_items_in_batch"] = (row["shift_labels"] != IGNORED).sum()
        stretch = self.segment_length * self.gradient_segments if self.gradient_segments else None
        stretches = list(cut(row, stretch))
        counts = self.accelerator.gather(torch.tensor([len(stretches)], device=self.args.device))
        if (counts != len(stretches)).any():
            raise ValueError(f"rows of {counts.tolist()} stretches in the processes: pad them to one length")
        return sum(super(LongContextMixin, self).training_step(model, x, num_items_in_batch) for x in stretches)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As `Trainer.compute_loss`; the outputs are nothing but the loss."""
        run = partial(self._run, model)
        return Trainer.compute_loss(self, run, inputs, return_outputs, num_items_in_batch)

    def _run(self, model: nn.Module, **inputs) -> CausalLMOutput:
        n = inputs.pop("num_items_in_batch", None)
        row = inputs if "starts" in inputs else prepare(inputs)
        if n is None:
            n = (row["shift_labels"] != IGNORED).sum()
        # The last rows of a text may have nothing to predict.
        n = torch.as_tensor(n).clamp(min=1)
        positions = row.pop("positions")
        state = self._carried_state(row["starts"][:, 0], positions[:, 0])
        # Without an input that wants a gradient a segment may have none: a tuned state's goes to starts of texts only.
        anchor = torch.zeros((), device=positions.device, requires_grad=True)
        loss, segments = 0.0, list(cut(row, self.segment_length))
        if torch.is_grad_enabled() and len(segments) > 1 and self.args.world_size > 1:
            raise ValueError("several processes train through one segment at a time: set gradient_segments=1")
        for i, segment in enumerate(segments):
            # The last one's gradients are wanted next: what it keeps need not be made again. Not even the nodes of a
            # graph are kept of the others: thousands of small things would keep the memory around them.
            if torch.is_grad_enabled() and i < len(segments) - 1:
                part, state = checkpoint(self._run_segment, model, segment, n, state, anchor, use_reentrant=True)
            else:
                part, state = self._run_segment(model, segment, n, state, anchor)
            loss = loss + part
        self.carried[self.model.training] = state.detach(), positions[:, -1] + 1
        return CausalLMOutput(loss=loss)

    def _carried_state(self, starts: Tensor, position: Tensor) -> Tensor | None:
        """What rows go on from that do not start a text; None where all do."""
        if starts.all():
            return None
        state, expected = self.carried.get(self.model.training, (None, position.new_zeros(0)))
        if len(expected) != len(starts) or (position != expected)[~starts].any():
            raise ValueError(
                f"rows go on with texts at tokens {position.tolist()}, the batch before ended at {expected.tolist()}: "
                "batches must come in order, and as many rows in each"
            )
        return state

    def _run_segment(
        self, model: nn.Module, segment: dict[str, Tensor], n: Tensor, state: Tensor | None, anchor: Tensor
    ):
        """The loss of a segment divided by n, and the state after it."""
        starts, inputs = segment["starts"], {key: x for key, x in segment.items() if key != "starts"}
        if state is not None and starts[:, 0].any():
            state = torch.where(starts[:, :1], self._first_state(state), state)
        if starts[:, 1:].any():
            inputs["seq_idx"] = starts.long().cumsum(1)
        cache = carried_cache(self.model.config, state)
        labels = inputs.pop("shift_labels")
        with without_logits():
            if self.segment_loss is None:
                loss = model(
                    **inputs, labels=labels, shift_labels=labels, num_items_in_batch=n, past_key_values=cache
                ).loss
            else:
                outputs = model(**inputs, past_key_values=cache)
                loss = self.segment_loss(outputs, None, num_items_in_batch=n, shift_labels=labels)
        return loss + anchor, packed_states(cache)

    def _first_state(self, like: Tensor) -> Tensor:
        """What texts begin with, (1, N)."""
        cache = carried_cache(self.model.config, torch.zeros_like(like[:1]))
        initial = [m.initial_state() for m in self.model.modules() if hasattr(m, "initial_state")]
        for layer, S in zip(cache.layers, initial, strict=True):
            if S is not None:
                layer.update_recurrent_state(S[None])
        return packed_states(cache)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "shift_labels" not in self._signature_columns:
            self._signature_columns.append("shift_labels")

    # The random numbers are what else a run must find as it left them.
    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        torch.save(self.carried.get(True), self._state_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            file = self._state_file(checkpoint)
            if not file.is_file():
                raise ValueError(f"{file}: missing: the checkpoint is another trainer's or of fewer processes")
            if carried := torch.load(file, self.args.device, weights_only=True):
                self.carried[True] = carried

    def _state_file(self, folder: str) -> Path:
        return Path(folder, f"long_context_{self.args.process_index}.pt")


def prepare(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of a language model as tensors (B, T) that may be cut in time.

    `starts` says where texts start, `positions` counts the tokens of each, `shift_labels` are the next tokens' labels.
    """
    ids, mask, positions = (inputs.get(key) for key in ("input_ids", "attention_mask", "position_ids"))
    starts = document_starts(ids, mask, positions, False, inputs.get("cu_seq_lens_q"), inputs.get("seq_idx"))
    starts = torch.zeros_like(ids, dtype=torch.bool) if starts is None else starts.clone()
    first = 0 if positions is None else positions[:, :1]
    starts[:, :1] = first == 0 if mask is None else (first == 0) | (mask[:, :1] == 0)
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    start = torch.where(starts, index, -1).cummax(1).values
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = nn.functional.pad(inputs["labels"], (0, 1), value=IGNORED)[:, 1:]
    row = {
        "input_ids": ids,
        "shift_labels": labels,
        "starts": starts,
        "positions": torch.where(start < 0, index + first, index - start),
    }
    return row if mask is None else row | {"attention_mask": mask}


def cut(row: dict[str, Tensor], length: int | None) -> Iterator[dict[str, Tensor]]:
    """Pieces in time of tensors (B, T); those without dimensions go with each."""
    T = row["input_ids"].shape[1]
    for start in range(0, T, length or T):
        yield {key: x[:, start : start + (length or T)].contiguous() if x.ndim else x for key, x in row.items()}


class ConsecutiveRows(Dataset):
    """Texts, lists of token ids, cut into consecutive rows of `length` tokens, for `lanes` texts at a time.

    Lane after lane gives its next row, so that draw by draw a batch of `lanes` rows (all processes' together) continues
    the one before it. Texts stand in a lane one behind another, the next in that which is shortest so far. Every token
    of a text is predicted but its first; a lane that ends before others is padded. Raises ValueError for an empty text.
    """

    def __init__(self, texts: Iterable[Sequence[int]], length: int, lanes: int = 1):
        self.length = length
        # A lane may stay empty.
        self.lanes = [[len(PADDING) * (torch.empty(0, dtype=torch.long),)] for _ in range(lanes)]
        filled = [0] * lanes
        for text in map(torch.as_tensor, texts):
            if not len(text):
                raise ValueError("a text has no tokens")
            lane = filled.index(min(filled))
            filled[lane] += len(text)
            following = nn.functional.pad(text[1:], (0, 1), value=IGNORED)
            labels = nn.functional.pad(text[1:], (1, 0), value=IGNORED)
            self.lanes[lane].append((text, labels, following, torch.arange(len(text)), torch.ones_like(text)))
        self.lanes = [[torch.cat(parts) for parts in zip(*lane, strict=True)] for lane in self.lanes]
        self.steps = -(-max(filled) // length)

    def __len__(self) -> int:
        return self.steps * len(self.lanes)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        if not 0 <= n < len(self):
            raise IndexError(n)
        step, lane = divmod(n, len(self.lanes))
        row = {}
        for (key, fill), stream in zip(PADDING.items(), self.lanes[lane], strict=True):
            piece = stream[step * self.length : (step + 1) * self.length]
            row[key] = nn.functional.pad(piece, (0, self.length - len(piece)), value=fill)
        return row
