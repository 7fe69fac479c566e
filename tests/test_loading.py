"""Loading a safetensors folder: weights stay in the file until they are used, and a tensor costs what it costs a Llama.

safetensors' own `load_file` maps the file and returns in milliseconds, whatever the size. What is left in
`from_pretrained` is transformers' work on each tensor, so a Llama with as many of them is what ours is compared with.
"""

import gc
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import TINY, busy_model, tiny_config
from oracle.official import random_official
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

MEGABYTE = 2**20
# What Python and torch may allocate on the way.
SLACK = 8 * MEGABYTE


def mapped(file: Path) -> list[range]:
    """The addresses at which this process has the file in its memory."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [line[0].split("-") for line in lines if line[-1] == str(file)]
    return [range(int(begin, 16), int(end, 16)) for begin, end in spans]


def resident(*fields: str) -> list[int]:
    """Bytes of this process's memory by the names of /proc/self/status."""
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return [1024 * int(status[field].split()[0]) for field in fields]


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder / "model.safetensors"


def not_in(file: Path, model) -> list[str]:
    spans = mapped(file)
    assert spans
    return [name for name, p in model.named_parameters() if not any(p.data_ptr() in span for span in spans)]


def test_weights_stay_in_the_file(model_type, tmp_path):
    file = saved(busy_model(model_type), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not_in(file, model) == []
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).get_output_embeddings().weight.any()


@pytest.mark.parametrize("version", ["4", "5.2", "6", "7"])
def test_official_names_copy_only_what_they_transpose(version, tmp_path):
    save_file(random_official(version, L=3, C=128, N=64, V=50), tmp_path / "model.safetensors")
    tiny_config("rwkv" if version == "4" else f"rwkv{version[0]}").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    copied = not_in(tmp_path / "model.safetensors", model)
    transposed = [name for name in model.state_dict() if "_lora.lora." in name and name.endswith(".weight")]
    assert sorted(copied) == sorted(transposed) and bool(transposed) == (version == "7")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory(model_type, dtype, tmp_path):
    """Nothing but tables in the dtype of the file, in another one the converted weights once and the pages read."""
    file = saved(busy_model(model_type, vocab_size=100_000), tmp_path)
    size = file.stat().st_size
    assert size > 6 * SLACK
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    gc.collect()
    # 5 lets the largest resident size begin anew.
    Path("/proc/self/clear_refs").write_text("5")
    before, anonymous_before = resident("VmRSS", "RssAnon")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    peak, anonymous = resident("VmHWM", "RssAnon")
    assert model.dtype == dtype
    converted = 0 if dtype == torch.float32 else size // 2
    assert anonymous - anonymous_before <= converted + SLACK
    assert peak - before <= (converted and converted + size) + SLACK


def calls_of_loading(folder: Path) -> int:
    """Python functions that `from_pretrained` calls, in all its threads, when it is called a second time."""
    calls = []
    # Patterns that other tests have pushed out of the cache of `re` are compiled anew.
    AutoModelForCausalLM.from_pretrained(folder)

    def count(frame, event, argument):
        if event == "call":
            calls.append(event)

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return len(calls)


def test_a_tensor_costs_what_it_costs_a_llama(model_type, tmp_path):
    """By calls, which are the same on every machine; so small a model takes tens of milliseconds, and they scatter."""
    width = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 50}
    saved(busy_model(model_type, **TINY[model_type] | {"num_hidden_layers": 12}), tmp_path / "ours")
    ours = len(AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict())
    # Nine tensors a layer, and three.
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=(ours - 3) // 9, **width))
    assert ours - 9 < len(llama.state_dict()) <= ours
    llama.save_pretrained(tmp_path / "llama")
    assert 10 * ours < calls_of_loading(tmp_path / "ours") <= calls_of_loading(tmp_path / "llama")
