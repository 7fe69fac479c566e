"""Official checkpoints of every version and variant, and how tests write, compare and convert them."""

import torch
from oracle.official import random_official
from safetensors.torch import save_file

# Arguments of `random_official` for each version and for what files of one version differ in.
VARIANTS = {
    "4": dict(version="4"),
    "5.0": dict(version="5.0"),
    "5.0-time_faaaa": dict(version="5.0", bonus_is_log=False),
    "5.1": dict(version="5.1"),
    "5.1-time_first": dict(version="5.1", bonus_is_log=True),
    "5.2": dict(version="5.2"),
    "5.2-time_first": dict(version="5.2", bonus_is_log=True),
    "6": dict(version="6"),
    "7": dict(version="7"),
    "7-layer0_v": dict(version="7", layer0_v=True),
}
# Flash-linear-attention has these, and its RWKV-7 is right for heads of 64 alone.
FLA = {"6": dict(version="6", C=64, N=16), "7": dict(version="7", C=128, N=64)}


def save(weights: dict[str, torch.Tensor], path):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    else:
        torch.save(weights, path)
    return path


def saved(path, **arguments) -> dict[str, torch.Tensor]:
    """Draw a checkpoint and save it."""
    weights = random_official(**arguments)
    save(weights, path)
    return weights


def assert_identical(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        as_bytes = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(*as_bytes), name


def assert_identical_file(path, expected: dict[str, torch.Tensor]):
    assert_identical(torch.load(path, weights_only=True), expected)


def low_rank(name: str) -> bool:
    """Whether safetensors mirrors have this matrix with its last two axes exchanged."""
    return name.endswith(("_w1", "_w2")) or name[-2:] in {letter + digit for letter in "wavg" for digit in "12"}
