"""The bench measures what it says: contenders run the same weights, forms compute the same, ratios are put right."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parents[1] / "kernels"
sys.path.insert(0, str(KERNELS))

import bench  # noqa: E402
import bench_chart  # noqa: E402
import bench_contenders  # noqa: E402
import bench_llama_cpp  # noqa: E402
import bench_operator  # noqa: E402
import bench_parts  # noqa: E402
import bench_tables as tables  # noqa: E402
import bench_weights  # noqa: E402
from bench_process import Contender  # noqa: E402

TINY = bench_weights.SHAPES["tiny"]
IDS = torch.randint(1, TINY.vocabulary, (24,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    cache = tmp_path_factory.mktemp("cache")
    bench_weights.write_checkpoint(TINY, cache)
    assert bench_weights.is_written(TINY, cache)
    return bench_weights.checkpoint_paths(TINY, cache)


@pytest.fixture(scope="module")
def ours(files) -> bench_contenders.Wkv:
    return bench_contenders.Wkv(TINY, *files, "float32")


@pytest.mark.parametrize("name", ["Rwkv", "Rwkv7Hf"])
def test_contenders_run_the_same_weights(name, files, ours, monkeypatch):
    for variable in ("RWKV_V7_ON", "RWKV_JIT_ON", "RWKV_CUDA_ON"):
        monkeypatch.setenv(variable, "")
    theirs = getattr(bench_contenders, name)(TINY, *files, "float32")
    torch.testing.assert_close(torch.tensor(ours.logits(IDS)), torch.tensor(theirs.logits(IDS)), atol=1e-4, rtol=0)
    assert ours.decode(3) > 0 and theirs.decode(3) > 0
    assert ours.next.argmax() == theirs.next.argmax()


@pytest.mark.parametrize("shape", bench_weights.other_generations(TINY), ids=lambda shape: shape.version)
def test_contenders_run_the_same_weights_of_other_generations(shape, tmp_path):
    bench_weights.write_checkpoint(shape, tmp_path)
    names = ("wkv", "rwkv", "native RWKV-4") if shape.version == "4" else ("wkv", "rwkv")
    files = bench_weights.checkpoint_paths(shape, tmp_path)
    # Not from the fork server, which keeps the standard error of the test that starts it.
    group = [Contender(*bench.MODELS[name], shape, *files, "float32", method="spawn") for name in names]
    logits = [torch.tensor(contender.call("logits", IDS)) for contender in group]
    assert all(contender.call("decode", 2) > 0 for contender in group)
    for contender in group:
        contender.close()
    for theirs in logits[1:]:
        torch.testing.assert_close(theirs, logits[0], atol=1e-4, rtol=0)


def test_llama_cpp_runs_the_same_weights(files, ours, monkeypatch):
    if not bench_llama_cpp.library(bench.CACHE):
        pytest.skip(f"no build of llama.cpp in {bench.CACHE}; kernels/bench.py makes one")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    bench_llama_cpp.convert(bench.CACHE, files[1], "float32", TINY.vocabulary, print)
    gguf = bench_llama_cpp.gguf_path(files[1], "float32")
    theirs = bench_llama_cpp.LlamaCpp(bench.CACHE, gguf, TINY.vocabulary, 1)
    first = theirs.logits(IDS)
    torch.testing.assert_close(torch.tensor(ours.logits(IDS)), torch.tensor(first), atol=1e-4, rtol=0)
    assert ours.decode(3) > 0 and theirs.decode(3) > 0
    assert ours.next.argmax() == theirs.next.argmax()
    assert theirs.logits(IDS) == first
    written = gguf.stat().st_mtime_ns
    bench_llama_cpp.convert(bench.CACHE, files[1], "float32", TINY.vocabulary, print)
    assert gguf.stat().st_mtime_ns == written


def test_llama_cpp_says_what_is_missing(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setenv("PATH", "")
        with pytest.raises(bench_llama_cpp.MissingError, match="not built: needs cmake"):
            bench_llama_cpp.build(tmp_path, print)
    with pytest.raises(bench_llama_cpp.MissingError, match=r"failed: `.*python.* -c .*`, exit code 3"):
        bench_llama_cpp._run(sys.executable, "-c", "print('the reason'); raise SystemExit(3)")
    assert "the reason" in capsys.readouterr().err


def test_the_share_of_zeros_is_that_of_trained_models(ours):
    prompt = list(range(1, 65))
    assert abs(ours.zeros(prompt) - bench_weights.ZEROS) < 0.02
    logits = ours.logits(IDS)
    assert ours.decode_with(bench_parts.DENSE, "zeros", prompt) < 0.02
    assert ours.logits(IDS) == logits


def test_sizes_of_the_models_are_right(ours):
    matrices = sum(p.numel() for name, p in ours.model.named_parameters() if p.dim() == 2 and "r_k" not in name)
    assert matrices == TINY.blocks + 2 * TINY.head
    assert sum(layer.ffn.value.weight.numel() for layer in ours.model.model.layers) == TINY.value
    shape = bench_weights.SHAPES["191m"]
    with torch.device("meta"):
        llama = bench_contenders.Llama(shape, None, None, "float32").model
    assert abs(llama.num_parameters() / (shape.blocks + 2 * shape.head) - 1) < 0.001


def test_decoding_after_a_context(files, ours):
    with torch.inference_mode():
        short, long = ours.cache_after(5), ours.cache_after(1500)
        tokens = torch.arange(1500)[None] % (TINY.vocabulary - 1) + 1
        whole = ours.model(tokens, use_cache=True, logits_to_keep=1).past_key_values
    assert [int(cache.get_seq_length()) for cache in (short, long)] == [5, 1500]
    for a, b in zip(long.layers, whole.layers, strict=True):
        torch.testing.assert_close(a.recurrent_states[0], b.recurrent_states[0], atol=1e-4, rtol=1e-4)
    states = {ours.decode_after(length, 2)[1] for length in (5, 1500)}
    llama = bench_contenders.Llama(TINY, *files, "bfloat16")
    caches = {length: llama.decode_after(length, 2)[1] for length in (0, 1500)}
    assert len(states) == 1
    # Keys and values of two bytes; the first token is not timed.
    assert caches == {length: (length + 3) * TINY.layers * TINY.width * 2 * 2 for length in caches}


def test_rows_are_decoded_together(ours):
    assert ours.decode_rows(3, 2) > 0
    assert ours.next.shape == (3, TINY.vocabulary)
    assert torch.equal(ours.next.argmax(-1), ours.next[:1].argmax(-1).expand(3))


def test_training_is_a_whole_step(ours):
    before = {name: p.clone() for name, p in ours.model.named_parameters()}
    assert ours.train(list(range(1, 33))) > 0
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in ours.model.named_parameters())


def test_adapters_are_on_every_projection_of_the_blocks(files):
    counts = []
    for contender in (bench_contenders.Wkv, bench_contenders.Llama):
        adapted = contender(TINY, *files, "bfloat16")
        counts.append(adapted.adapt())
        trained = [name for name, p in adapted.model.named_parameters() if p.requires_grad]
        assert trained and all(".lora_" in name for name in trained)
        assert adapted.train(IDS) > 0
    assert 0.8 < counts[0] / counts[1] < 1.25


@pytest.mark.parametrize("op", bench_operator.OPERATORS)
def test_the_forms_of_the_operator_agree(op):
    operator = bench_operator.Operator(op, T=48, H=2, K=16)
    for form in operator.forms:
        assert operator.error(form) < 1e-5
        assert operator.step(form) > 0


def test_naive_chunks_have_the_gradients_of_the_loop():
    operator = bench_operator.Operator("wkv7", T=32, H=2, K=8)
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
    assert tables.ratio([3.0], [1.0]) == "3.0x"
    assert tables.speed(512, [2.0, 4.0, 4.0], [1.0, 1.0, 1.0]) == "128: 4.0x (2.00-4.0)"
    assert tables.share([0.5, 0.6, 0.9], [1.0, 1.0, 1.0]) == ", 60%"
    assert tables.size(2.4e9) == "2.40 GB" and tables.size(37e6) == "37 MB"
    assert tables.heading("a", "b") == "| a | b |\n| --- | --- |"


def test_the_chart_is_a_picture(tmp_path):
    points = {(name, length): (80.0, 2e9) for name in bench_chart.COLOURS for length in (0, 4096)}
    bench_chart.draw(tmp_path / "chart.png", (0, 4096), points)
    assert [file.name for file in tmp_path.iterdir()] == ["chart.png"]
    assert (tmp_path / "chart.png").read_bytes()[:4] == b"\x89PNG"


def test_a_missing_or_failing_contender_says_so(capfd):
    missing = Contender("no-such-distribution", "bench_contenders.Rwkv")
    assert missing.call("prefill", [1]) is None
    assert missing.problem == "not installed: pip install no-such-distribution"
    missing.close()
    failing = Contender("torch", "bench_contenders.Rwkv", TINY, Path("/no/such/file.pth"), None, "float32")
    assert failing.call("prefill", [1]) is None
    assert failing.problem == "failed: FileNotFoundError"
    failing.close()
    assert "/no/such/file" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--threads 0", "--threads: must be at least 1, got 0"),
        ("--only decode", "invalid choice: 'decode'"),
        ("--chart curve.jpg", "--chart: must end in .png, got curve.jpg"),
        ("--chart nowhere/curve.png", "--chart: no such folder: nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments, complaint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments.split()])
    with pytest.raises(SystemExit) as exit:
        bench.main()
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and complaint in error, error


def run(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The program itself on the tiny shape, with a cache of its own; a build of llama.cpp is taken over."""
    cache = tmp_path / "wkv-bench"
    cache.mkdir()
    bench_llama_cpp.home(cache).symlink_to(bench_llama_cpp.home(bench.CACHE))
    return subprocess.run(
        [sys.executable, KERNELS / "bench.py", "--shape", "tiny", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)} | environment,
    )


def test_one_part_of_a_run(tmp_path):
    result = run(tmp_path, "--only", "context", "--chart", str(tmp_path / "chart.png"))
    assert result.returncode == 0 and "failed" not in result.stdout, result.stderr
    assert re.findall(r"^\| (\d+) tokens \|", result.stdout, re.MULTILINE) == ["0", "64", "2048"], result.stdout
    assert (tmp_path / "chart.png").exists() and "| prefill" not in result.stdout


@pytest.mark.slow
def test_a_run_prints_every_row(tmp_path):
    built = bench_llama_cpp.library(bench.CACHE)
    result = run(tmp_path, **({} if built else {"PATH": ""}))
    assert result.returncode == 0, result.stderr
    for row in (
        "GB/s with 1",
        "| loop over tokens (`naive_recurrent_wkv4`)",
        "| prefill, 32 tokens, bf16 |",
        "| decode, batch 1, fp32, none of the FFN zero |",
        "| decode, batch 8 ",
        "| 2048 tokens |",
        "| T = 32, fp32 |",
        "| T = 64, bf16 |",
        "| adapters' parameters |",
        "| RWKV-4 L2-D128, training step, T = 32, bf16 |",
        "| RWKV-6 L2-D128, decode, batch 1, fp32 |",
    ):
        assert row in result.stdout, result.stdout
    assert "failed" not in result.stdout
    assert result.stdout.count("not built: needs cmake") == (0 if built else 8)
