"""The pre-training recipe, run as its docstring says on a small corpus; its baselines; and the model it made."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import busy_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import wkv

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))

from average import average  # noqa: E402
from baselines import NgramModel  # noqa: E402
from corpus import Blocks, bits_per_byte, split, token_stream  # noqa: E402

STEPS = 30
OPTIONS = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "block_length": 32,
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    "warmup_steps": 2,
    "logging_steps": 1,
    "save_steps": 5,
    "eval_steps": 15,
    "held_out": 1,
}
# From the address of 24 February 2026, which is held out.
HELD_OUT_EXCERPT = """Less than 5 months from now, our country will celebrate an epic milestone in American history: \
the 250th anniversary of our glorious American independence.

This July 4, we will mark two and a half centuries of liberty and triumph, progress and freedom in the most \
incredible and exceptional nation ever to exist on the face of the Earth. And you've seen nothing yet. We're going to \
do better and better and better. This is the golden age of America."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Three texts of some thousand words over a small vocabulary, in an order that a model can learn."""
    folder = tmp_path_factory.mktemp("texts")
    words = [
        "the",
        "people",
        "of",
        "our",
        "country",
        "have",
        "given",
        "their",
        "trust",
        "to",
        "a",
        "just",
        "government",
    ]
    for number in range(3):
        sentences = (words[(number + i) % 7 :] + words[: i % 5] for i in range(400))
        (folder / f"{number}.txt").write_text("\n\n".join(" ".join(sentence) + "." for sentence in sentences))
    return folder


def start(output: Path, corpus: Path, **changes) -> subprocess.Popen:
    options = {**OPTIONS, "output_dir": output, "texts": corpus, **changes}
    arguments = [str(text) for name, value in options.items() for text in (f"--{name}", value)]
    command = [sys.executable, "-u", str(RECIPES / "pretrain.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return output


def stop_after(process: subprocess.Popen, losses: int, number: signal.Signals) -> None:
    """Send a signal once that many steps have been logged, and wait for the end."""
    for line in process.stdout:
        losses -= line.startswith("{'loss'")
        if losses == 0:
            break
    assert losses == 0, "the run ended before it could be interrupted"
    process.send_signal(number)
    process.communicate(timeout=120)


def final_loss(log: str) -> str:
    return re.findall(r"{'loss': '([^']+)'", log)[-1]


def test_interrupted_and_killed_run_ends_as_an_uninterrupted_one(tmp_path, corpus):
    whole = finish(start(tmp_path / "whole", corpus))
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "tokenizer").rename(tmp_path / "parts" / "tokenizer")

    process = start(tmp_path / "parts", corpus)
    stop_after(process, 3, signal.SIGINT)
    assert process.returncode == 128 + signal.SIGINT
    saved = {path.name for path in (tmp_path / "parts").glob("checkpoint-*")}
    assert saved and not (tmp_path / "parts" / "final").exists()

    process = start(tmp_path / "parts", corpus)
    stop_after(process, 8, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    newest = max((tmp_path / "parts").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    # What a kill in the middle of saving leaves behind.
    unfinished = tmp_path / "parts" / "checkpoint-29"
    unfinished.mkdir()
    (unfinished / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:1000])

    parts = finish(start(tmp_path / "parts", corpus))
    assert parts.count("{'loss'") < STEPS - int(newest.name.split("-")[1]) + 1
    assert final_loss(parts) == final_loss(whole)
    expected, resumed = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert float(final_loss(whole)) < 0.75 * float(re.search(r"{'loss': '([^']+)'", whole)[1])
    assert (tmp_path / "whole" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_average_is_the_mean_of_every_weight(tmp_path):
    models = [busy_model("rwkv7", seed=seed) for seed in (1, 2, 3)]
    for seed, model in enumerate(models):
        model.save_pretrained(tmp_path / f"checkpoint-{seed}")
    averaged = average(sorted(tmp_path.glob("checkpoint-*"))).state_dict()
    for name, tensor in averaged.items():
        torch.testing.assert_close(tensor, sum(model.state_dict()[name] for model in models) / 3)


def test_missing_texts_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no \.txt files"):
        split(tmp_path / "nowhere")
    (tmp_path / "only.txt").write_text("one text")
    with pytest.raises(ValueError, match="held_out"):
        split(tmp_path, held_out=1)


def test_held_out_are_the_five_newest_speeches():
    training, held_out = split()
    assert list(held_out) == ["2020-Trump-1", "2022-Biden-1", "2023-Biden-1", "2024-Biden-1", "2026-Trump-1"]
    assert len(training) == 244 and HELD_OUT_EXCERPT in held_out["2026-Trump-1"]


def test_blocks_visit_the_stream_once_a_cycle():
    stream = torch.arange(5000)
    blocks = Blocks(stream, block_length=16, samples=1000)
    assert all(blocks.blocks % divisor for divisor in range(2, 18)) and blocks.blocks % 3 == 2
    first = sorted(int(blocks[n]["input_ids"][0]) for n in range(blocks.blocks))
    assert first == list(range(0, 16 * blocks.blocks, 16))
    second = sorted(int(blocks[blocks.blocks + n]["input_ids"][0]) for n in range(blocks.blocks))
    assert second == [start + 9 for start in first]
    with pytest.raises(IndexError):
        blocks[1000]


def test_ngram_probabilities_add_up_to_one():
    ngram = NgramModel([b"to be or not to be, that is the question", b"tomorrow and tomorrow"], order=3)
    for context in (b"t", b"tomorrow an", b"zebra"):
        before = ngram.bits_per_byte(context) * len(context)
        after = [ngram.bits_per_byte(context + bytes([byte])) * (len(context) + 1) for byte in range(256)]
        assert sum(2 ** (before - bits) for bits in after) == pytest.approx(1)
    # Both texts begin with "to"; after no context at all, "t" is the commonest letter.
    assert ngram.bits_per_byte(b"to") < 1 < ngram.bits_per_byte(b"ot")


@pytest.fixture(scope="module")
def shipped():
    folder = wkv.demo_model_path()
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_shipped_model_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in wkv.demo_model_path().iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert sum(files.values()) < 16_000_000


def test_shipped_model_predicts_a_held_out_excerpt(shipped):
    assert bits_per_byte(*shipped, HELD_OUT_EXCERPT) < 1.37


def test_bits_per_byte_carries_the_state_over_segments(shipped):
    model, tokenizer = shipped
    ids = token_stream(tokenizer, [HELD_OUT_EXCERPT])[None, :-1]
    with torch.inference_mode():
        loss = model(input_ids=ids, labels=ids).loss.item()
    expected = loss * (ids.shape[1] - 1) / torch.log(torch.tensor(2.0)).item() / len(HELD_OUT_EXCERPT.encode())
    assert bits_per_byte(model, tokenizer, HELD_OUT_EXCERPT, segment=7) == pytest.approx(expected, rel=2e-3)
