"""Memory while decoding: the weights, the state and little else, however many steps."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import busy_model, random_ids, tiny_config
from step_cases import decode, values
from transformers import AutoModelForCausalLM

reads_peak = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc"
)


def decode_for_long(model, B: int, n: int) -> int:
    """Bytes by which the process grew over n steps, after as many as it takes to settle."""
    process, cache = psutil.Process(), None
    for steps in (500, n):
        before = process.memory_info().rss
        for _ in range(steps // 100):
            _, cache = decode(model, random_ids(B, 100), cache)
    return process.memory_info().rss - before


def test_memory_does_not_grow():
    assert decode_for_long(busy_model("rwkv7", num_hidden_layers=1), 2, 10_000) < 2 * 2**20


@pytest.mark.slow
def test_memory_does_not_grow_over_many_steps():
    assert decode_for_long(busy_model("rwkv6"), 2, 100_000) < 4 * 2**20


# Prints the growth to the peak of memory in the first step of a model, in matrices that change their order.
FIRST_STEP = """
import psutil
from pathlib import Path
from conftest import busy_model, random_ids
from step_cases import decode, module_by_module, values

model = busy_model("rwkv7", hidden_size=512, head_dim=64, intermediate_size=4096, num_hidden_layers=6)
ids = random_ids(1, 2)
with module_by_module():
    decode(model, ids)
Path("/proc/self/clear_refs").write_text("5")
before = psutil.Process().memory_info().rss
decode(model, ids)
assert not values(model)[5].is_contiguous()
peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
print((peak - before) / values(model)[0].nbytes)
"""


@reads_peak
def test_first_step_never_holds_the_weights_twice():
    """The new order of the six matrices is made one by one; in a process of its own, without others' freed memory."""
    command = [sys.executable, "-c", FIRST_STEP]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 3


# Prints the peak of memory from before the weights were loaded until after decoding, less what was there before.
DECODE = """
import sys, psutil, torch, wkv
from pathlib import Path
from transformers import AutoModelForCausalLM

def decode(model):
    model.generate(torch.tensor([[1, 2]]), max_new_tokens=20, eos_token_id=None, do_sample=False, pad_token_id=0)

decode(AutoModelForCausalLM.from_pretrained(sys.argv[1]))
Path("/proc/self/clear_refs").write_text("5")
before = psutil.Process().memory_info().rss
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
decode(model)
assert not model.model.layers[0].ffn.value.weight.is_contiguous()
status = Path("/proc/self/status").read_text()
print(1024 * int(status.split("VmHWM:")[1].split()[0]) - before)
"""


@reads_peak
def test_peak_is_the_weights_and_64_megabytes(tmp_path):
    """In a process of its own, from loading on, the change of the matrices' order included; the state is small here."""
    sizes = {"hidden_size": 512, "head_dim": 64, "intermediate_size": 8192, "num_hidden_layers": 6}
    weights = 0
    for name, changes in (("tiny", {}), ("large", sizes)):
        model = AutoModelForCausalLM.from_config(tiny_config("rwkv7", **changes))
        weights = sum(p.nbytes for p in model.parameters())
        model.save_pretrained(tmp_path / name)
    command = [sys.executable, "-c", DECODE, tmp_path / "tiny", tmp_path / "large"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # More of the matrices that change their order than could hide in the allowance.
    assert sum(value.nbytes for value in values(model)) > 90 * 2**20
    assert weights / 2 < int(result.stdout) < weights + 64 * 2**20
