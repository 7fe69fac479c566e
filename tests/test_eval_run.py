"""What a run of `wkv eval` rests on: digests of tasks and documents, batches and memory that a machine has."""

import functools
import json
import subprocess
from types import SimpleNamespace

import psutil
import pytest
import torch
from task_cases import load_data

from wkv import eval_run
from wkv.eval_command import Settings
from wkv.eval_models import Subject, _batch_by_memory
from wkv.eval_selection import documents_sha256, tasks_sha256


def make_task(documents: list, examples: list = (), shots: int = 0):
    """Its definition holds functions, whose addresses are other ones in each process."""
    return SimpleNamespace(
        config=SimpleNamespace(task="t", num_fewshot=shots),
        dump_config=lambda: {"process": functools.partial(lambda x: x, 1), "metadata": {"pretrained": id(documents)}},
        eval_docs=documents,
        fewshot_docs=lambda: list(examples),
    )


def test_digests_are_of_the_definition_and_of_the_documents():
    one, other = make_task([{"q": 1}]), make_task([{"q": 2}])
    assert tasks_sha256([one]) == tasks_sha256([other])
    assert documents_sha256([one]) == documents_sha256([make_task([{"q": 1}], ["x"])]) != documents_sha256([other])
    examples = make_task([{"q": 1}], ["x"], shots=1)
    assert documents_sha256([one]) == documents_sha256([examples], 0) != documents_sha256([examples])
    assert documents_sha256([examples]) == documents_sha256([make_task([{"q": 1}], ["x"])], 3)


@pytest.mark.parametrize(("free", "batch"), [(0, 1), (4 * 12 * 10 * 100 * 3, 3), (10**9, 8)])
def test_batches_on_a_cpu_are_what_memory_holds(monkeypatch, free, batch):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=100))
    model = SimpleNamespace(max_length=10, model=SimpleNamespace(config=config))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert _batch_by_memory(model) == batch


def test_a_process_that_was_killed_is_named(monkeypatch, capsys):
    """That which measures memory, without which an evaluation goes on, and that which makes needles."""
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    subject = Subject("m", "rwkv7", {"pretrained": "x"}, "x", None)
    assert eval_run._memory_by_context(subject, Settings(("t",), context_lengths=(8,))) == {}
    assert "m: memory could not be measured: its process ended with exit code -9" in capsys.readouterr().err
    with pytest.raises(ChildProcessError, match="exit code -9"):
        load_data().needle()


def test_peak_memory_of_a_gpu_begins_anew(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", called.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1234)
    eval_run._reset_peak_memory("cuda:1")
    assert called == ["empty", "cuda:1"]
    subject = Subject("m", "rwkv7", {"pretrained": "x"}, "x", None)
    model = SimpleNamespace(model=torch.nn.Linear(1, 1), tokens_asked=1, tokens_computed=1)
    facts = eval_run._facts(subject, Settings(("t",), device="cuda:1"), model, SimpleNamespace(seconds=1.0))
    assert facts["peak_memory_bytes"] == 1234 and json.dumps(facts)
