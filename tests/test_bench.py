"""The bench measures what it says: contenders run the same weights, forms compute the same, ratios are put right."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parents[1] / "kernels"
sys.path.insert(0, str(KERNELS))

import bench_contenders  # noqa: E402
import bench_operator  # noqa: E402
import bench_tables as tables  # noqa: E402
from bench_process import Contender  # noqa: E402

TINY = bench_contenders.SHAPES["tiny"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    cache = tmp_path_factory.mktemp("cache")
    bench_contenders.write_checkpoint(TINY, cache)
    return bench_contenders.checkpoint_paths(TINY, cache)


@pytest.mark.parametrize("name", ["Rwkv", "Rwkv7Hf"])
def test_contenders_run_the_same_weights(name, files, monkeypatch, capsys):
    for variable in ("RWKV_V7_ON", "RWKV_JIT_ON", "RWKV_CUDA_ON"):
        monkeypatch.setenv(variable, "")
    ids = torch.randint(1, TINY.vocabulary, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    ours = bench_contenders.Wkv(TINY, *files, "float32")
    theirs = getattr(bench_contenders, name)(TINY, *files, "float32")
    torch.testing.assert_close(torch.tensor(ours.logits(ids)), torch.tensor(theirs.logits(ids)), atol=1e-4, rtol=0)
    assert ours.decode(3) > 0 and theirs.decode(3) > 0
    assert ours.next.argmax() == theirs.next.argmax()


def test_llama_has_as_many_parameters():
    shape = bench_contenders.SHAPES["191m"]
    with torch.device("meta"):
        llama = bench_contenders.Llama(shape, None, None, "float32").model
    D, L, V, F, ranks = shape.width, shape.layers, shape.vocabulary, shape.feed_forward, 64 + 64 + 32 + 128
    ours = 2 * V * D + L * (4 * D * D + 2 * D * F + 2 * D * ranks)
    assert abs(llama.num_parameters() / ours - 1) < 0.001


def test_training_is_a_whole_step(files):
    ours = bench_contenders.Wkv(TINY, *files, "float32")
    before = {name: p.clone() for name, p in ours.model.named_parameters()}
    assert ours.train(list(range(1, 33))) > 0
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in ours.model.named_parameters())


def test_the_forms_of_the_operator_agree():
    operator = bench_operator.Wkv7(T=48, H=2, K=16)
    for form in operator.forms:
        assert operator.error(form) < 1e-5
        assert operator.step(form) > 0


def test_naive_chunks_have_the_gradients_of_the_loop():
    operator = bench_operator.Wkv7(T=32, H=2, K=8)
    gradients = []
    for form in ("naive chunks", "loop"):
        inputs = [t.clone().requires_grad_() for t in operator.inputs]
        o, state = operator.forms[form](*inputs)
        ((o * operator.gradient).sum() + state.square().sum()).backward()
        gradients.append([t.grad for t in inputs])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_a_ratio_above_one_means_that_ours_is_faster():
    assert tables.ratio([3.0, 8.0, 10.0], [1.0, 2.0, 1.0]) == "4.0x (3.0-10.0)"
    assert tables.speed(512, [2.0, 4.0, 4.0], [1.0, 1.0, 1.0]) == "128: 4.0x (2.00-4.0)"
    assert tables.heading("a", "b") == "| a | b |\n| --- | --- |"


def test_a_missing_or_failing_contender_says_so(capfd):
    missing = Contender("no-such-distribution", "bench_contenders.Rwkv", 1)
    assert missing.call("prefill", [1]) is None
    assert missing.problem == "not installed: pip install no-such-distribution"
    missing.close()
    failing = Contender("torch", "bench_contenders.Rwkv", 1, TINY, Path("/no/such/file.pth"), None, "float32")
    assert failing.call("prefill", [1]) is None
    assert failing.problem == "failed: FileNotFoundError"
    failing.close()
    assert "/no/such/file" in capfd.readouterr().err


@pytest.mark.slow
def test_a_quick_run_prints_every_row(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = subprocess.run(
        [sys.executable, KERNELS / "bench.py", "--quick", "--shape", "tiny"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    for row in (
        "GB/s",
        "| loop over tokens",
        "| prefill, 512 tokens, bf16 |",
        "| decode, batch 1, fp32 |",
        "| training",
    ):
        assert row in result.stdout, result.stdout
    assert "failed" not in result.stdout
