"""Folders as other programs write them: their configurations, and what tests of loading them share."""

import functools
import json
import tempfile
from pathlib import Path

import torch
from checkpoint_cases import VARIANTS, saved
from oracle.official import official_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wkv.checkpoints import convert

IDS = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))
MODEL_TYPES = {"4": "rwkv", "5.0": "rwkv5", "5.1": "rwkv5", "5.2": "rwkv5", "6": "rwkv6", "7": "rwkv7"}
_ROOT = tempfile.TemporaryDirectory()


@functools.cache
def case(version: str) -> tuple[dict[str, torch.Tensor], Path, torch.Tensor]:
    """The official tensors of a version, our folder of them, and the logits of the `rwkv` package for IDS."""
    file, folder = Path(_ROOT.name) / f"{version}.pth", Path(_ROOT.name) / version
    # Heads of 64, for which flash-linear-attention's group norm epsilon (1e-5 times the head size) is the official one.
    official = saved(file, **VARIANTS[version], L=3, C=128, N=64, V=50)
    convert(file, folder, tokenizer=False)
    return official, folder, torch.stack([official_logits(file, row.tolist())[0] for row in IDS])


def write_folder(folder, weights: dict[str, torch.Tensor], config: dict):
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_loads(folder, expected, **arguments):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not any(report.values()), report
    assert type(model).__module__.startswith("wkv."), type(model)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-4, rtol=0)
    return model


def assert_saves_as_ours(model, ours, expected, folder):
    """Whatever was read, our own layout is written."""
    model.save_pretrained(folder)
    found, canonical = load_file(folder / "model.safetensors"), load_file(ours / "model.safetensors")
    assert found.keys() == canonical.keys()
    for name, tensor in canonical.items():
        assert found[name].shape == tensor.shape and torch.equal(found[name], tensor), name
    assert_loads(folder, expected)


# A config of fla-hub/rwkv7-*, less the sizes that can be read from the tensors, plus what such configs say wrongly.
FLA7_CONFIG = {
    "architectures": ["RWKV7ForCausalLM"],
    "attn": None,
    "attn_mode": "chunk",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "fuse_cross_entropy": True,
    "fuse_norm": False,
    "head_dim": 64,
    "hidden_act": "sqrelu",
    "hidden_ratio": 4.0,
    "hidden_size": 128,
    "initializer_range": 0.006,
    "intermediate_size": None,
    "max_position_embeddings": 2048,
    "model_type": "rwkv7",
    "norm_bias": True,
    "norm_eps": 1e-05,
    "norm_first": True,
    "num_heads": None,
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 50,
}
# One of a converted RWKV-6 World model. Its own class would take norm_eps for the group norm too.
FLA6_CONFIG = FLA7_CONFIG | {
    "architectures": ["RWKV6ForCausalLM"],
    "expand_k": 1.0,
    "expand_v": 1.0,
    "gate_low_rank_dim": 5,
    "hidden_ratio": 3.5,
    "model_type": "rwkv6",
    "num_heads": 2,
    "proj_low_rank_dim": 3,
}
del FLA6_CONFIG["head_dim"]


# A config of the RWKV-5 and RWKV-6 repositories that came with their own code.
REMOTE_CONFIG = {
    "attention_hidden_size": 128,
    "head_size": 64,
    "head_size_divisor": 8,
    "hidden_size": 128,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "num_attention_heads": 64,
    "num_hidden_layers": 3,
    "rescale_every": 6,
    "vocab_size": 50,
}
# A config of a fork that has RWKV-7 under the name of RWKV-4.
FORK_CONFIG = {"model_type": "rwkv", "architecture_version": "rwkv7", "hidden_size": 128, "head_size": 32}
