"""What can be wrong with a checkpoint beyond names and shapes: its values, and what comes out when it is run."""

import contextlib
import functools
import importlib.util
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from .folders import folder_tensors, hub_config
from .sources import Source, read_source
from .tensor_files import CheckpointError, LazyTensor, write_pth

logger = logging.get_logger(__name__)

# Conversion is exact; two float32 programs differ by rounding that grows with depth. A wrong layout gives 1 and more.
_TOLERANCE = 1e-2


def refuse_nonfinite(path: Path, tensors: dict[str, LazyTensor]) -> None:
    """Raise `CheckpointError` that names the tensors with NaN or infinite values, with how many."""
    bad = []
    for name, tensor in tensors.items():
        if count := int((~torch.isfinite(tensor.read())).sum()):
            bad.append(f"{name} ({count})")
    if bad:
        raise CheckpointError(f"{path}: NaN or infinite values in {', '.join(bad)}")


def refuse_folded_embedding(path: Path, tensors: dict[str, LazyTensor]) -> None:
    """Raise `CheckpointError` for embeddings that ln0 was applied to, as inference programs do: it would act twice.

    Such rows have mean 0 and variance 1 once the scale and bias of ln0 are taken out, which a trained table never has.
    """
    scale, bias = (tensors[f"blocks.0.ln0.{leaf}"].read().float().flatten() for leaf in ("weight", "bias"))
    rows = tensors["emb.weight"].read()[:64].float()
    plain = (rows - bias) / scale
    normal = plain.mean(-1).abs().lt(0.02) & (plain.var(-1, correction=0) - 1).abs().lt(0.05)
    again = torch.nn.functional.layer_norm(rows, bias.shape, scale, bias)
    if normal.all() and not torch.allclose(again, rows, atol=0.05, rtol=0.05):
        raise CheckpointError(f"{path}: emb.weight has ln0 folded in already; use the original file")


def logit_difference(source: Source, result: Path) -> float | None:
    """The largest difference between the float32 logits of a source and of what was made of it.

    Folders run as they load, through `from_pretrained`; files in the `rwkv` package where it is installed and can run
    them, else in our own model. None, with a warning, where memory is short. Raises `CheckpointError` when the
    difference cannot be rounding.
    """
    # Float32 weights and half as much for what is made of them on the way.
    needed = 6 * sum(torch.Size(tensor.shape).numel() for tensor in source.tensors.values())
    if needed > (free := psutil.virtual_memory().available):
        message = f"that takes {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"
        logger.warning(f"outputs were not compared: {message}")
        return None
    ids = torch.randint(source.sizes["V"], (32,), generator=torch.Generator().manual_seed(0)).tolist()
    expected, found = _logits(source.path, ids), _logits(result, ids)
    difference = (found - expected).abs().max().item()
    # Written so that NaN is refused.
    if not difference <= _TOLERANCE * expected.abs().max().item():
        raise CheckpointError(f"{result}: its logits differ by {difference:.3g} from those of {source.path}")
    return difference


def _logits(path: Path, ids: list[int]) -> torch.Tensor:
    """The logits (T, V) of a checkpoint of any layout."""
    if path.is_dir():
        return _run(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), ids)
    source = read_source(path)
    runs_there = source.layout == "official" and source.sizes["A"] == source.sizes["C"]
    if runs_there and importlib.util.find_spec("rwkv"):
        return _official_logits(source, ids)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hub_config(source), dtype=torch.float32)
    tensors = folder_tensors(source, source.generation.rows)
    model.load_state_dict({name: tensor.read().float() for name, tensor in tensors.items()}, assign=True)
    return _run(model.eval(), ids)


def _run(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


def _official_logits(source: Source, ids: list[int]) -> torch.Tensor:
    module = _package(for_rwkv7=source.version == "7")
    with contextlib.redirect_stdout(io.StringIO()), _as_pth(source) as path:
        logits, _ = module.RWKV(str(path.with_suffix("")), "cpu fp32").forward(ids, None, full_output=True)
    return logits


@functools.cache
def _package(for_rwkv7: bool) -> ModuleType:
    """The module `rwkv.model`, which runs either RWKV-7 or RWKV-4 to 6: its switches are read while it is imported."""
    os.environ.update(RWKV_V7_ON=str(int(for_rwkv7)), RWKV_JIT_ON="0", RWKV_CUDA_ON="0")
    [folder] = importlib.util.find_spec("rwkv").submodule_search_locations
    name = f"_rwkv_model_{'7' if for_rwkv7 else '456'}"
    spec = importlib.util.spec_from_file_location(name, Path(folder) / "model.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _as_pth(source: Source) -> Iterator[Path]:
    """A `.pth` file with the usual names and shapes, as the package wants it, ending in .pth.

    In float32: the package normalises the embeddings of RWKV-4 to 6 in the dtype of the file.
    """
    tensors = source.tensors | source.unused
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.pth"
        if source.plain and (source.version == "7" or {tensor.dtype for tensor in tensors.values()} == {torch.float32}):
            path.symlink_to(source.path.resolve())
        else:
            write_pth(path, {name: _in_float32(tensor) for name, tensor in tensors.items()})
        yield path


def _in_float32(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.shape, torch.float32, lambda: tensor.read().float())
