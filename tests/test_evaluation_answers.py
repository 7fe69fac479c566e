"""Answers that are kept: a killed evaluation goes on, and nobody gets what another model or request was answered."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import evaluation_cases as cases
import pytest
import torch
from evaluation_cases import GREEDY, PAIRS, PROMPTS, TEXTS, ask, assert_same_scores, ours
from lm_eval.api.model import CachingLM
from peft_cases import adapted

import wkv
from wkv import evaluation_answers
from wkv.evaluation import WkvLM
from wkv.evaluation_answers import HEADER

KINDS = {"loglikelihood": PAIRS, "loglikelihood_rolling": TEXTS, "generate_until": PROMPTS}
# Arguments: a folder and a file of answers. Slowly enough to be killed in the middle.
PROGRAM = """
import sys, time
from evaluation_cases import PAIRS, ask
from transformers import AutoModelForCausalLM, AutoTokenizer
from wkv.evaluation import WkvLM
lm = WkvLM(sys.argv[1], dtype="float32", batch_size=1, cache=sys.argv[2])
add = lm.answers.add
lm.answers.add = lambda answers: (add(answers), time.sleep(0.2))
print("ready", flush=True)
ask(lm, "loglikelihood", PAIRS)
"""


@pytest.fixture(scope="module")
def model():
    return cases.model("rwkv7")


def answer_all(lm) -> dict:
    return {kind: ask(lm, kind, arguments) for kind, arguments in KINDS.items()}


def test_what_was_answered_is_not_computed_again(model, tmp_path):
    file = tmp_path / "answers"
    lm = ours(model, cache=file)
    expected = answer_all(lm)
    assert expected == answer_all(ours(model)) and lm.tokens_computed > 0
    again = ours(model, cache=file)
    held = file.read_bytes()
    assert answer_all(again) == expected
    assert again.tokens_computed == again.tokens_asked == 0
    assert file.read_bytes() == held
    # A request more is all that is computed.
    ask(again, "loglikelihood", [*PAIRS, ("union", " the")])
    assert again.tokens_computed == len(again.tok_encode("union"))


def test_an_unfinished_line_is_passed_over(model, tmp_path):
    """As a process leaves it that was killed while it wrote; also the very first line."""
    file = tmp_path / "answers"
    expected = ask(ours(model, cache=file), "loglikelihood", PAIRS)
    whole = file.read_bytes()
    for cut in (2, 20, len(whole) - len(HEADER) - 30, len(whole) - 5):
        file.write_bytes(whole[:-cut])
        again = ours(model, cache=file)
        assert_same_scores(ask(again, "loglikelihood", PAIRS), expected)
        assert again.tokens_computed > 0
        last = ours(model, cache=file)
        assert_same_scores(ask(last, "loglikelihood", PAIRS), expected)
        assert last.tokens_computed == 0


@pytest.mark.slow
def test_a_killed_process_goes_on(tmp_path):
    file = tmp_path / "answers"
    folder = wkv.demo_model_path()
    command = [sys.executable, "-c", PROGRAM, str(folder), str(file)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"ready\n"
    while len(file.read_bytes().splitlines()) < 8:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    held = len(file.read_bytes().splitlines()) - 1
    assert 8 <= held + 1 < len(PAIRS)

    lm, fresh = (WkvLM(str(folder), dtype="float32", device="cpu", cache=cache) for cache in (file, None))
    assert lm.answers.by_key and len(lm.answers.by_key) >= held - 1
    assert_same_scores(ask(lm, "loglikelihood", PAIRS), ask(fresh, "loglikelihood", PAIRS))
    assert 0 < lm.tokens_asked < fresh.tokens_asked
    assert len(file.read_bytes().splitlines()) - 1 >= len(set(PAIRS))


def test_answers_belong_to_a_model_and_a_request(model, tmp_path):
    """Another weight, dtype, adapter, leading token or option: nothing is taken from the file."""
    file = tmp_path / "answers"
    ask(ours(model, cache=file), "loglikelihood", PAIRS[:4])
    ask(ours(model, cache=file), "generate_until", [("the", GREEDY)])
    other = cases.model("rwkv7")
    with torch.no_grad():
        other.model.layers[1].ffn.value.weight[3, 5] += 1e-3
    for changed, options in (
        (other, {}),
        (cases.model("rwkv7").bfloat16(), {}),
        (adapted(cases.model("rwkv7")), {}),
        (adapted(cases.model("rwkv7"), lora_alpha=3), {}),
        (model, {"leading_token": True}),
    ):
        # Each reads what those before it have left in the file.
        lm = ours(changed, cache=file, **options)
        ask(lm, "loglikelihood", PAIRS[:4])
        assert lm.tokens_computed > 0
    lm = ours(model, cache=file)
    for prompt in (("the", GREEDY | {"max_gen_toks": 3}), ("the", GREEDY | {"until": ["x"]}), ("th", GREEDY)):
        lm.tokens_computed = 0
        ask(lm, "generate_until", [prompt])
        assert lm.tokens_computed > 0


@pytest.mark.parametrize("changed", ["generation", "eos", "adapter", "thinking"])
def test_answers_belong_to_the_options_of_generation(tmp_path, changed):
    model, tokenizer = adapted(cases.model("rwkv7")), cases.tokenizer()
    model.add_adapter("other", model.peft_config["default"])
    lms = [ours(model, tokenizer=tokenizer, cache=tmp_path / "answers")]
    ask(lms[0], "generate_until", [("the", GREEDY)])
    if changed == "generation":
        model.generation_config.repetition_penalty = 1.3
    elif changed == "eos":
        tokenizer.eos_token = "A"
    elif changed == "adapter":
        model.set_adapter("other")
    options = {"think_end_token": "x"} if changed == "thinking" else {}
    lms.append(ours(model, tokenizer=tokenizer, cache=tmp_path / "answers", **options))
    ask(lms[1], "generate_until", [("the", GREEDY)])
    assert lms[1].tokens_computed > 0


def test_samples_are_drawn_anew(model, tmp_path):
    lm = ours(model, cache=tmp_path / "answers")
    prompt = ("the state", {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0})
    assert len({*ask(lm, "generate_until", [prompt]), *ask(lm, "generate_until", [prompt])}) == 2
    assert (tmp_path / "answers").read_bytes() == HEADER


@pytest.mark.parametrize("content", [b'{"results": 1}\n', b"\x00\x01binary", b'{"format"}'])
def test_other_files_are_not_written_to(model, tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError, match="f: not a file of answers by wkv"):
        ours(model, cache=tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == content


def test_lines_are_whole_when_they_are_written(model, tmp_path, monkeypatch):
    """Each batch is one write, so that what a killed process leaves is at most one unfinished line."""
    writes = []
    append = evaluation_answers.Answers._append
    monkeypatch.setattr(evaluation_answers.Answers, "_append", lambda s, data: (writes.append(data), append(s, data)))
    ask(ours(model, cache=tmp_path / "answers"), "loglikelihood", PAIRS)
    lines = b"".join(writes).splitlines()
    assert len(lines) == len(PAIRS) and all(set(json.loads(line)) == {"key", "answer"} for line in lines)
    assert 1 < len(writes) < len(PAIRS) and all(data.endswith(b"\n") or not data for data in writes)


def test_lm_evals_own_cache_is_filled(model, tmp_path):
    """`lm_eval run --use_cache`: answers of a request reach its database."""
    lm = ours(model)
    caching = CachingLM(lm, str(tmp_path / "db"))
    expected = caching.loglikelihood(cases.requests("loglikelihood", PAIRS[:5]))
    computed = lm.tokens_computed
    assert caching.loglikelihood(cases.requests("loglikelihood", PAIRS[:5])) == expected
    assert lm.tokens_computed == computed > 0
