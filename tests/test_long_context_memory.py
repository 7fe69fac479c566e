"""The memory of training in segments does not grow with the length; every run is a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

reads_peak = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc"
)

# Prints how much the peak of memory is above what there was before the first of several single training steps, in MiB.
SCRIPT = """
import json, sys, tempfile
import torch
from conftest import busy_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
import wkv
from wkv.long_context import LongContextMixin

class LongTrainer(LongContextMixin, Trainer):
    pass

def memory(name):
    status = open("/proc/self/status").read()
    return int(status.split(name + ":")[1].split()[0]) / 1024

size, steps = json.loads(sys.argv[1])
model = busy_model("rwkv7")
if size == "demo":
    model = AutoModelForCausalLM.from_pretrained(wkv.demo_model_path(), dtype=torch.bfloat16)
before, peaks = memory("VmRSS"), []
for T, options in steps:
    ids = torch.randint(1, model.config.vocab_size, (T,))
    arguments = TrainingArguments(
        tempfile.mkdtemp(), use_cpu=True, report_to="none", save_strategy="no", max_steps=1, disable_tqdm=True
    )
    trainer = LongTrainer if options else Trainer
    trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}], **options).train()
    peaks.append(memory("VmHWM") - before)
print(json.dumps(peaks))
"""


def peaks(size: str, *steps: tuple[int, dict]) -> list[float]:
    command = [sys.executable, "-c", SCRIPT, json.dumps([size, steps])]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@reads_peak
def test_memory_is_that_of_a_segment():
    whole = {"segment_length": 256}
    steps = (512, whole), (4096, whole), (4096, whole | {"gradient_segments": 1}), (4096, {})
    short, long, cut, plain = peaks("tiny", *steps)
    assert max(long, cut) - short < 10
    assert plain - short > 50


@pytest.mark.slow
@reads_peak
@pytest.mark.parametrize("gradient_segments", [None, 1])
def test_a_quarter_of_a_million_tokens(gradient_segments):
    options = {"segment_length": 1024, "gradient_segments": gradient_segments}
    # The second trainer of a process finds what the first has left.
    _, short, middle, long = peaks("demo", *((T, options) for T in (2**12, 2**12, 2**15, 2**18)))
    print(f"above the loaded model: {short:.0f} MiB at 4k tokens, {middle:.0f} at 32k, {long:.0f} at 256k")
    assert long < 2048
    assert long - short < (200 if gradient_segments is None else 20)
