"""The memory order of the channel-mix's last matrix: by rows as it is saved, or by hidden unit, for decoding."""

import ctypes
import mmap
import sys

import torch
from torch import nn
from transformers.utils import is_torchdynamo_compiling

# Linux: reclaim these pages. Unlike other advice it can lose nothing: what is not in a file stays.
_PAGE_OUT = 21
_madvise = ctypes.CDLL(None).madvise if sys.platform == "linux" else None
if _madvise is not None:
    _madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class ReorderedChannelMix(nn.Module):
    """A channel-mix whose last matrix, `value`, the decoding step may give another memory order, never other values.

    Training and saving get it back by rows.
    """

    def by_rows_for_gradients(self) -> None:
        """Part of every forward pass."""
        if torch.is_grad_enabled() and not is_torchdynamo_compiling():
            by_rows(self.value)

    def train(self, mode: bool = True):
        if mode:
            by_rows(self.value)
        return super().train(mode)

    def _save_to_state_dict(self, *args):
        by_rows(self.value)
        super()._save_to_state_dict(*args)


def by_rows(value: nn.Module) -> None:
    """Undo what `by_hidden_unit` did to the channel-mix's last matrix: training and saving expect plain tensors.

    An optimizer may keep its state in the order of memory, and safetensors takes no other.
    """
    weight = getattr(value, "weight", None)
    if type(weight) is nn.Parameter and weight.ndim == 2 and not weight.is_contiguous() and weight.mT.is_contiguous():
        _replace(weight, weight.detach().contiguous)


def by_hidden_unit(values: list[nn.Linear]) -> None:
    """Give matrices (C, F) the strides (1, C): same values, but what a hidden unit contributes lies together."""
    kept, place = None, (0, 0)
    for value in values:
        old = _by_hidden_unit(value)
        if old is not None:
            # Another thread may be reading the old order. It lives until the next matrix is done, so there are never
            # more of them than two.
            kept, last, place = old, place, (old.data_ptr(), old.nbytes)
            del old
            _let_go(*last)
    del kept
    _let_go(*place)


def _by_hidden_unit(value: nn.Linear) -> torch.Tensor | None:
    """The old tensor; None where it stays: a gradient fixes the order, and shared memory is not ours to move.

    Nor is that of one of several processes: under FSDP it looks like any other, but is freed and filled again.
    """
    weight = value.weight
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return None
    if not weight.is_contiguous() or weight.grad is not None or weight.is_shared() or weight.is_inference():
        return None
    old = weight.data
    _replace(weight, lambda: weight.detach().mT.contiguous().mT)
    return old


def _replace(weight: nn.Parameter, make) -> None:
    # A tensor made in inference mode could never be trained again.
    with torch.inference_mode(False), torch.no_grad():
        weight.data = make()


def _let_go(address: int, n_bytes: int) -> None:
    """Give back the pages of a matrix that nobody uses any more, but that stays mapped with the others of its file."""
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if _madvise is not None and begin < end:
        # Memory that is not there any more is no error.
        _madvise(begin, end - begin, _PAGE_OUT)
