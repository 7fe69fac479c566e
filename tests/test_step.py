"""The fused step computes what the modules do, for every size, dtype, batch, number of threads and instruction set.

Letters: B rows, C residual width, F hidden units of the channel-mix.
"""

import copy
import os
import random
import subprocess
import sys
import threading

import pytest
import torch
from conftest import assert_close, busy_model, random_ids, states
from step_cases import decode, decode_exactly, heads, module_by_module, part, steps, values  # noqa: F401

library = pytest.importorskip("wkv_kernels.library")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_sizes(model_type: str, seed: int) -> tuple[dict, int]:
    """Sizes of a model, most of them no multiple of any vector's length, and a batch size."""
    draw = random.Random(seed)
    K = draw.choice([8, 20, 32, 64, 128])
    H = draw.randint(1, max(1, 160 // K))
    options = {
        "rwkv": {},
        "rwkv5": {name: draw.random() < 0.5 for name in ("use_gate", "decay_per_head", "bonus_is_log")},
        "rwkv6": {name: draw.randint(1, 40) for name in ("time_mix_extra_dim", "time_decay_extra_dim")},
        "rwkv7": {f"{name}_low_rank_dim": draw.randint(1, 40) for name in ("decay", "a", "v", "gate")},
    }
    return {
        **heads(model_type, H, K),
        "hidden_size": H * K if draw.random() < 0.5 else draw.randint(2, 150),
        "num_hidden_layers": draw.randint(1, 3),
        "intermediate_size": draw.randint(1, 300),
        **options[model_type],
    }, draw.randint(1, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_parity(model_type, seed, dtype, steps):  # noqa: F811
    sizes, B = random_sizes(model_type, seed)
    model, ids = busy_model(model_type, seed=seed, **sizes).to(dtype), random_ids(B, 6, seed=seed)
    expected, expected_cache = decode_exactly(model, ids)
    assert not steps
    logits, cache = decode(model, ids)
    assert len(steps) == 6
    assert logits.dtype == dtype
    assert_close(logits, expected, dtype, f"{sizes} B={B}")
    assert_close(states(cache), states(expected_cache), dtype, f"{sizes} B={B}")
    assert [layer.cumulative_length for layer in cache.layers] == [6] * len(cache.layers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_closer_to_the_exact_result_than_the_modules(model_type, dtype, steps):  # noqa: F811
    """Activations are float32, so in half precision only the carried tokens and the logits are rounded."""
    model, ids = busy_model(model_type).to(dtype), random_ids(4, 24)
    exact, _ = decode_exactly(model, ids)
    with module_by_module():
        plain, _ = decode(model, ids)
    fused, _ = decode(model, ids)
    assert len(steps) == 24
    assert (fused - exact).square().mean() < (plain - exact).square().mean()


@pytest.mark.parametrize("isa", library.available_isas()[1:])
def test_every_instruction_set(isa):
    tests = "parity and (-0- or -1-) or skipped and 0.5"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", tests, __file__]
    environment = {**os.environ, "WKV_ISA": isa, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_threads_do_not_change_a_bit(model_type, seed, dtype, steps):  # noqa: F811
    """Models large enough for several threads, of sizes that no part of the work divides."""
    draw, results = random.Random(seed), []
    sizes = {"hidden_size": draw.randint(150, 400), **heads(model_type, 5, 36)}
    sizes |= {"intermediate_size": draw.choice([5, 700, 1300]) + draw.randint(0, 99), "num_hidden_layers": 2}
    model, ids = busy_model(model_type, **sizes).to(dtype), random_ids(draw.choice([1, 2, 5, 16]), 3)
    expected, _ = decode_exactly(model, ids)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        logits, cache = decode(model, ids)
        results.append([logits, *states(cache)])
    assert len(steps) == 9
    assert_close(results[0][0], expected, dtype, f"{sizes} {tuple(ids.shape)}")
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


def test_two_models_in_two_threads(model_type):
    ids = random_ids(2, 200)
    models = [busy_model(model_type, seed=seed) for seed in range(2)]
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


def at_odd_address(x):
    """A copy that begins one element into its memory."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_addresses(model_type, dtype, steps):  # noqa: F811
    """Of weights, states and embeddings."""
    sizes = {"hidden_size": 37, **heads(model_type, 4, 16)}
    model, ids = busy_model(model_type, **sizes).to(dtype), random_ids(3, 4)
    expected, cache = decode(model, ids)
    for p in model.parameters():
        p.data = at_odd_address(p.data)
    for layer in cache.layers:
        for held in (layer.conv_states, layer.recurrent_states):
            held.update({i: at_odd_address(state) for i, state in held.items() if state is not None})
    cache.reset()
    with torch.no_grad():
        tokens = (at_odd_address(model.get_input_embeddings()(token)) for token in ids.split(1, 1))
        logits = [model(inputs_embeds=x, past_key_values=cache).logits for x in tokens]
    assert len(steps) == 8
    assert torch.equal(torch.cat(logits, 1), expected)
    assert all(state.data_ptr() % 16 for state in states(cache))


# The mix of the channel-mix's key, and the value that leaves the current token as it is.
KEY_MIX = {"rwkv": ("time_mix_key", 1), "rwkv5": ("time_mix_key", 1), "rwkv6": ("time_maa_k", 0), "rwkv7": ("x_k", 0)}


def sparse_model(model_type: str, share: float, F: int = 200):
    """A model and which of its hidden units (layer, F) can be active: for the others relu sees -1, whatever the input.

    Channel 0 of what the channel-mix reads is always 1.
    """
    model, (mix, current) = busy_model(model_type, intermediate_size=F), KEY_MIX[model_type]
    active = torch.rand(model.config.num_hidden_layers, F, generator=torch.Generator().manual_seed(1)) >= share
    with torch.no_grad():
        for layer, units in enumerate(active):
            norm, ffn = part(model, "ffn_norm", layer), part(model, "ffn", layer)
            norm.weight[0], norm.bias[0], getattr(ffn, mix).view(-1)[0] = 0, 1, current
            ffn.key.weight[~units] = 0
            ffn.key.weight[~units, 0] = -1
    return model, active


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99, 1])
@pytest.mark.parametrize("B", [1, 16])
def test_skipped_units_make_no_difference(model_type, B, share, steps):  # noqa: F811
    model, active = sparse_model(model_type, share)
    dense, ids = copy.deepcopy(model), random_ids(B, 4)
    logits, cache = decode(model, ids)
    with module_by_module():
        expected, _ = decode(model, ids)
    assert_close(logits, expected)

    # Adding their zeros instead of skipping them: the order of memory as loaded, in which all rows are read.
    for value in values(dense):
        value.grad = torch.zeros_like(value)
    assert_close(decode(dense, ids)[0], logits)
    assert all(value.is_contiguous() for value in values(dense))

    # What nobody reads may be anything, and units that are not there give the same bits.
    poisoned, smaller = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for poisoned_value, smaller_value, units in zip(values(poisoned), values(smaller), active, strict=True):
            poisoned_value[:, ~units], smaller_value[:, ~units] = torch.nan, 0
    for other in (poisoned, smaller):
        other_logits, other_cache = decode(other, ids)
        assert torch.equal(other_logits, logits)
        assert all(torch.equal(x, y) for x, y in zip(states(other_cache), states(cache), strict=True))


def test_infinity_and_nan_are_passed_on(model_type):
    for bad in (torch.inf, torch.nan):
        model = busy_model(model_type)
        with torch.no_grad():
            part(model, "ffn.key").weight[5] = bad
        logits, _ = decode(model, random_ids(2, 2))
        assert logits.isnan().all()


STEPS = """
import sys, torch, wkv
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

torch.set_num_threads(2)
sizes = {"vocab_size": 256, "hidden_size": 768, "intermediate_size": 768, "num_hidden_layers": 12}
model = AutoModelForCausalLM.from_config(AutoConfig.for_model(sys.argv[1], **sizes)).bfloat16().eval()
cache, ids = DynamicCache(config=model.config), torch.ones(8, 1, dtype=torch.long)
with torch.no_grad():
    for _ in range(10_000):
        model(ids, past_key_values=cache)
"""


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["rwkv6", "rwkv7"])
def test_threads_wake_each_other(model_type):
    """A wake-up that is missed, once in some thousand steps, is a process that sleeps for ever."""
    subprocess.run([sys.executable, "-c", STEPS, model_type], check=True, timeout=600)
