"""The fused step computes what the modules do, for every size, dtype, batch, number of threads and instruction set.

Letters: B rows, C residual width, F hidden units of the channel-mix.
"""

import copy
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
from conftest import assert_close, busy_model, random_ids, states
from rwkv7_step_cases import decode, decode_exactly, module_by_module, steps  # noqa: F401
from torch import nn

library = pytest.importorskip("wkv_kernels.library")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_sizes(seed: int) -> tuple[dict, int]:
    """Sizes of a model, most of them no multiple of any vector's length, and a batch size."""
    draw = random.Random(seed)
    head_dim = draw.choice([8, 20, 32, 64, 128])
    heads = draw.randint(1, max(1, 160 // head_dim))
    sizes = {name: draw.randint(1, 40) for name in ("decay", "a", "v", "gate")}
    return {
        "hidden_size": heads * head_dim if draw.random() < 0.5 else draw.randint(2, 150),
        "head_dim": head_dim,
        "num_heads": heads,
        "attention_hidden_size": heads * head_dim,
        "num_hidden_layers": draw.randint(1, 3),
        "intermediate_size": draw.randint(1, 300),
        **{f"{name}_low_rank_dim": size for name, size in sizes.items()},
    }, draw.randint(1, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_parity(seed, dtype, steps):  # noqa: F811
    sizes, B = random_sizes(seed)
    model, ids = busy_model("rwkv7", seed=seed, **sizes).to(dtype), random_ids(B, 6, seed=seed)
    expected, expected_cache = decode_exactly(model, ids)
    assert not steps
    logits, cache = decode(model, ids)
    assert len(steps) == 6
    assert logits.dtype == dtype
    assert_close(logits, expected, dtype, f"{sizes} B={B}")
    assert_close(states(cache), states(expected_cache), dtype, f"{sizes} B={B}")
    assert [layer.cumulative_length for layer in cache.layers] == [6] * len(cache.layers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_closer_to_the_exact_result_than_the_modules(dtype, steps):  # noqa: F811
    """Activations are float32, so in half precision only the carried tokens and the logits are rounded."""
    model, ids = busy_model("rwkv7").to(dtype), random_ids(4, 24)
    exact, _ = decode_exactly(model, ids)
    with module_by_module():
        plain, _ = decode(model, ids)
    fused, _ = decode(model, ids)
    assert len(steps) == 24
    assert (fused - exact).square().mean() < (plain - exact).square().mean()


@pytest.mark.parametrize("isa", library.available_isas()[1:])
def test_every_instruction_set(isa):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", "parity or skipped", __file__]
    environment = {**os.environ, "WKV_ISA": isa, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("B", [1, 5])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_threads_do_not_change_a_bit(dtype, B):
    model = busy_model("rwkv7", hidden_size=256, head_dim=64, intermediate_size=900, num_hidden_layers=2).to(dtype)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        logits, cache = decode(model, random_ids(B, 5))
        results.append([logits, *states(cache)])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


def test_two_models_in_two_threads():
    ids = random_ids(2, 200)
    models = [busy_model("rwkv7", seed=seed) for seed in range(2)]
    alone = [decode(model, ids)[0] for model in models]
    together = [None, None]

    def run(i):
        together[i] = decode(models[i], ids)[0]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(x, y) for x, y in zip(together, alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_weights_and_states(dtype, steps):  # noqa: F811
    model, ids = busy_model("rwkv7").to(dtype), random_ids(3, 4)
    expected, cache = decode(model, ids)
    for p in model.parameters():
        memory = torch.empty(p.numel() + 1, dtype=dtype)
        p.data = memory[1:].view(p.shape).copy_(p.data)
    for layer in cache.layers:
        memory = torch.empty(layer.recurrent_states[0].numel() + 1)
        layer.recurrent_states[0] = memory[1:].view(layer.recurrent_states[0].shape)
    cache.reset()
    logits, _ = decode(model, ids, cache)
    assert len(steps) == 8
    assert torch.equal(logits, expected)


def sparse_model(share: float, F: int = 200, **changes):
    """A model and which of its hidden units (layer, F) can be active: for the others relu sees -1, whatever the input.

    Channel 0 of what the channel-mix reads is always 1.
    """
    model = busy_model("rwkv7", intermediate_size=F, **changes)
    active = torch.rand(len(model.model.layers), F, generator=torch.Generator().manual_seed(1)) >= share
    with torch.no_grad():
        for block, units in zip(model.model.layers, active, strict=True):
            block.ffn_norm.weight[0], block.ffn_norm.bias[0], block.ffn.x_k[0] = 0, 1, 0
            block.ffn.key.weight[~units] = 0
            block.ffn.key.weight[~units, 0] = -1
    return model, active


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.86, 0.99, 1])
@pytest.mark.parametrize("B", [1, 3, 16])
def test_skipped_units_make_no_difference(B, share, steps):  # noqa: F811
    model, active = sparse_model(share)
    dense, ids = copy.deepcopy(model), random_ids(B, 4)
    logits, cache = decode(model, ids)
    with module_by_module():
        expected, _ = decode(model, ids)
    assert_close(logits, expected)

    # Adding their zeros instead of skipping them: the order of memory as loaded, in which all rows are read.
    for block in dense.model.layers:
        block.ffn.value.weight.grad = torch.zeros_like(block.ffn.value.weight)
    assert_close(decode(dense, ids)[0], logits)
    assert all(block.ffn.value.weight.is_contiguous() for block in dense.model.layers)

    # What nobody reads may be anything, and units that are not there give the same bits.
    poisoned, smaller = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for blocks in zip(poisoned.model.layers, smaller.model.layers, active, strict=True):
            blocks[0].ffn.value.weight[:, ~blocks[2]] = torch.nan
            blocks[1].ffn.value.weight[:, ~blocks[2]] = 0
    for other in (poisoned, smaller):
        other_logits, other_cache = decode(other, ids)
        assert torch.equal(other_logits, logits)
        assert all(torch.equal(x, y) for x, y in zip(states(other_cache), states(cache), strict=True))


def test_units_that_are_not_there_give_the_same_bits(steps):  # noqa: F811
    model, active = sparse_model(0.5, num_hidden_layers=1)
    ids = random_ids(3, 4)
    logits, _ = decode(model, ids)
    ffn = model.model.layers[0].ffn
    for linear, weight in ((ffn.key, ffn.key.weight[active[0]]), (ffn.value, ffn.value.weight[:, active[0]])):
        linear.weight = nn.Parameter(weight.detach().contiguous())
    assert torch.equal(decode(model, ids)[0], logits)
    assert len(steps) == 8
    assert ffn.value.weight.shape == (64, int(active.sum()))


def test_infinity_and_nan_are_passed_on():
    for bad in (torch.inf, torch.nan):
        model = busy_model("rwkv7")
        with torch.no_grad():
            model.model.layers[1].ffn.key.weight[5] = bad
        logits, _ = decode(model, random_ids(2, 2))
        assert logits.isnan().all()


def decode_for_long(model, B: int, n: int) -> int:
    """Bytes by which the process grew over n steps, after as many as it takes to settle."""
    process, cache = psutil.Process(), None
    for steps in (500, n):  # noqa: F402
        before = process.memory_info().rss
        for _ in range(steps // 100):
            _, cache = decode(model, random_ids(B, 100), cache)
    return process.memory_info().rss - before


def test_memory_does_not_grow():
    assert decode_for_long(busy_model("rwkv7", num_hidden_layers=1), 2, 10_000) < 2 * 2**20


@pytest.mark.slow
def test_memory_does_not_grow_over_many_steps():
    assert decode_for_long(busy_model("rwkv7"), 2, 100_000) < 4 * 2**20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_first_step_never_holds_the_weights_twice():
    """The new order of the matrices is made one by one."""
    model = busy_model("rwkv7", hidden_size=512, head_dim=64, intermediate_size=4096, num_hidden_layers=6)
    matrix = model.model.layers[0].ffn.value.weight.nbytes
    ids = random_ids(1, 2)
    with module_by_module():
        decode(model, ids)
    Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    decode(model, ids)
    assert not model.model.layers[5].ffn.value.weight.is_contiguous()
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    assert peak - before < 3 * matrix
