"""What can be wrong with a checkpoint beyond names and shapes: its values, and what comes out when it is run."""

import contextlib
import importlib.util
import io
import os
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from .tensor_files import Checkpoint, CheckpointError, open_checkpoint

logger = logging.get_logger(__name__)

# Conversion is exact; two float32 programs differ by rounding that grows with depth. A wrong layout gives 1 and more.
_TOLERANCE = 1e-2


def refuse_nonfinite(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` that names the tensors with NaN or infinite values, with how many."""
    bad = []
    for name, tensor in checkpoint.tensors.items():
        if count := int((~torch.isfinite(tensor.read())).sum()):
            bad.append(f"{name} ({count})")
    if bad:
        raise CheckpointError(f"{checkpoint.path}: NaN or infinite values in {', '.join(bad)}")


def refuse_folded_embedding(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` for embeddings that ln0 was applied to, as inference programs do: it would act twice.

    Such rows have mean 0 and variance 1 once the scale and bias of ln0 are taken out, which a trained table never has.
    """
    scale, bias = (checkpoint.tensors[f"blocks.0.ln0.{leaf}"].read().float().flatten() for leaf in ("weight", "bias"))
    rows = checkpoint.tensors["emb.weight"].read()[:64].float()
    plain = (rows - bias) / scale
    normal = plain.mean(-1).abs().lt(0.02) & (plain.var(-1, correction=0) - 1).abs().lt(0.05)
    again = torch.nn.functional.layer_norm(rows, bias.shape, scale, bias)
    if normal.all() and not torch.allclose(again, rows, atol=0.05, rtol=0.05):
        raise CheckpointError(f"{checkpoint.path}: emb.weight has ln0 folded in already; use the original file")


def logit_difference(official: Path, folder: Path, sizes: dict[str, int]) -> float | None:
    """The largest difference between the float32 logits of the `rwkv` package on a file and of our model in a folder.

    None, with a warning that says why, where the package is absent or cannot run the file, or memory is short. Raises
    `CheckpointError` when the difference cannot be rounding.
    """
    if reason := _cannot_compare(official, sizes):
        logger.warning(f"outputs were not compared: {reason}")
        return None
    ids = torch.randint(sizes["V"], (1, 32), generator=torch.Generator().manual_seed(0))
    expected = _official_logits(official, ids[0].tolist())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        difference = (model(ids, use_cache=False).logits[0] - expected).abs().max().item()
    # Written so that NaN is refused.
    if not difference <= _TOLERANCE * expected.abs().max().item():
        raise CheckpointError(f"{folder}: its logits differ by {difference:.3g} from those of {official}")
    return difference


def _cannot_compare(official: Path, sizes: dict[str, int]) -> str | None:
    if importlib.util.find_spec("rwkv") is None:
        return "the `rwkv` package is not installed (`pip install rwkv`)"
    if sizes["A"] != sizes["C"]:
        return "the `rwkv` package runs only models whose attention is as wide as their residual stream"
    if official.is_dir() or official.suffix == ".safetensors":
        return "the `rwkv` package reads .pth files only"
    # Float32 weights and half as much for what is made of them on the way.
    needed = 6 * sum(torch.Size(tensor.shape).numel() for tensor in open_checkpoint(official).tensors.values())
    if needed > (free := psutil.virtual_memory().available):
        return f"that takes {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free"
    return None


def _official_logits(path: Path, ids: list[int]) -> torch.Tensor:
    # The package reads this at import, and defines its RWKV-7 class only then.
    os.environ["RWKV_V7_ON"] = "1"
    if not hasattr(sys.modules.get("rwkv.model"), "RWKV_x070"):
        sys.modules.pop("rwkv.model", None)
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as scratch:
        from rwkv.model import RWKV_x070

        # It also insists on the suffix .pth.
        link = Path(scratch) / "model"
        link.with_suffix(".pth").symlink_to(path.resolve())
        logits, _ = RWKV_x070(str(link), "cpu fp32").forward(ids, None, full_output=True)
    return logits
