"""Our models against the official `rwkv` package on random official checkpoints; the package is the judge.

In half precision the package has two paths that differ at the 1e-3 level: its Python path casts the state to the
model's dtype before reading it out and forms the rank-one products in that dtype; its CUDA kernels take everything to
float32 first. Our operator does the second. Against the package's CPU (Python) path we ask for closeness within the
tolerance of the dtype, and against the float64 oracle for an error that is not larger than the package's own.

Letters: L layers, C width, N head size, A attention width, V vocabulary, T tokens.
"""

import numpy as np
import pytest
import torch
from conftest import TOLERANCE, assert_close, random_ids
from oracle.official import official_logits, official_rwkv7, random_official_rwkv7, zero_state
from oracle.rwkv7_numpy import Rwkv7
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

T = 40
# The rwkv package squeezes singleton axes, so it cannot run ranks of 1; the oracle can.
SHAPES = {
    "C32-N8": {},
    "C64-N32": {"C": 64, "N": 32, "ranks": (7, 5, 3, 11)},
    "C128-N64": {"C": 128, "N": 64, "L": 2, "ranks": (32, 32, 32, 32)},
    "C256-N128": {"C": 256, "N": 128, "L": 2, "V": 300, "ranks": (13, 9, 17, 33)},
    "C128-N128-one-head": {"C": 128, "N": 128, "L": 2},
    "C96-N32-odd-F": {"C": 96, "N": 32, "F": 101, "ranks": (3, 5, 7, 2)},
    "L1": {"L": 1, "C": 64, "N": 32},
    "L6": {"L": 6, "C": 64, "N": 16},
    "layer0-v": {"layer0_v": True},
}

# official name inside a block -> ours, and what happens to the tensor on the way
VECTOR, MIX, SAME, TRANSPOSED = torch.flatten, torch.clone, torch.clone, torch.t
RENAMES = {
    "ln0.": ("pre_norm.", SAME),
    "ln1.": ("attn_norm.", SAME),
    "ln2.": ("ffn_norm.", SAME),
    **{f"att.x_{letter}": (f"attn.x_{letter}", MIX) for letter in "rwkvag"},
    **{f"att.{letter}0": (f"attn.{letter}_lora.lora.2.bias", VECTOR) for letter in "wav"},
    **{f"att.{letter}1": (f"attn.{letter}_lora.lora.0.weight", TRANSPOSED) for letter in "wavg"},
    **{f"att.{letter}2": (f"attn.{letter}_lora.lora.2.weight", TRANSPOSED) for letter in "wavg"},
    "att.k_k": ("attn.k_k", VECTOR),
    "att.k_a": ("attn.k_a", VECTOR),
    "att.r_k": ("attn.r_k", SAME),
    "att.receptance.": ("attn.r_proj.", SAME),
    "att.key.": ("attn.k_proj.", SAME),
    "att.value.": ("attn.v_proj.", SAME),
    "att.output.": ("attn.o_proj.", SAME),
    "att.ln_x.": ("attn.g_norm.", SAME),
    "ffn.x_k": ("ffn.x_k", VECTOR),
    "ffn.": ("ffn.", SAME),
}


def our_weights(weights: dict) -> dict:
    """The official dict under our names; written out here so that this test trusts no converter."""
    ours = {
        "model.embeddings.weight": weights["emb.weight"],
        "lm_head.weight": weights["head.weight"],
        "model.norm.weight": weights["ln_out.weight"],
        "model.norm.bias": weights["ln_out.bias"],
    }
    for name, tensor in weights.items():
        if not name.startswith("blocks.") or name.startswith(("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")):
            continue
        _, layer, rest = name.split(".", 2)
        theirs = next(prefix for prefix in RENAMES if rest.startswith(prefix))
        new, change = RENAMES[theirs]
        ours[f"model.layers.{layer}.{new}{rest[len(theirs) :]}"] = change(tensor)
    return ours


def our_model(weights: dict, dtype=torch.float32):
    H, N = weights["blocks.0.att.r_k"].shape
    V, C = weights["emb.weight"].shape
    ranks = {letter: weights[f"blocks.{'1' if letter == 'v' else '0'}.att.{letter}1"].shape[1] for letter in "wag"}
    config = AutoConfig.for_model(
        "rwkv7",
        vocab_size=V,
        hidden_size=C,
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
        head_dim=N,
        attention_hidden_size=H * N,
        intermediate_size=weights["blocks.0.ffn.key.weight"].shape[0],
        decay_low_rank_dim=ranks["w"],
        a_low_rank_dim=ranks["a"],
        v_low_rank_dim=weights["blocks.1.att.v1"].shape[1] if "blocks.1.att.v1" in weights else None,
        gate_low_rank_dim=ranks["g"],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in our_weights(weights).items()}, strict=True)
    return model


def run(model, ids, slices, cache=None):
    """Logits (T, V) over slices of the given lengths, and the cache."""
    logits = []
    with torch.no_grad():
        for piece in torch.tensor(ids)[None].split(slices, 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0])
    return torch.cat(logits), cache


def official_state(cache) -> list[torch.Tensor]:
    """Our cache as the package's list: shift, S with rows = value channels, channel-mix shift, layer after layer."""
    return [
        t[0]
        for layer in cache.layers
        for t in (layer.conv_states[0].squeeze(-1), layer.recurrent_states[0].mT, layer.conv_states[1].squeeze(-1))
    ]


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES)
def case(request):
    weights = random_official_rwkv7(**{"V": 37, **request.param})
    V = weights["emb.weight"].shape[0]
    return weights, random_ids(T, vocab_size=V).tolist()


def test_oracle_equals_package(case):
    weights, ids = case
    logits, state = Rwkv7(weights).forward(ids)
    official, official_final = official_logits(weights, ids)
    assert np.abs(logits).max() > 2
    assert_close(torch.tensor(logits), official)
    assert_close([torch.tensor(s) for s in state], official_final)


@pytest.mark.parametrize("slices", [[T], [1] * T, [5, 1, 33, 1]], ids=["sequence", "steps", "slices"])
def test_ours_equals_package(case, slices):
    weights, ids = case
    official, official_final = official_logits(weights, ids)
    logits, cache = run(our_model(weights), ids, slices)
    assert_close(logits, official, what="logits")
    assert_close(official_state(cache), official_final, what="state")


def test_ours_equals_package_step_mode():
    """The package's one-token path is code of its own."""
    weights, ids = random_official_rwkv7(C=64, N=32), random_ids(T, vocab_size=37).tolist()
    package = official_rwkv7(weights)
    state, steps = zero_state(package, torch.float32), []
    for token in ids:
        logits, state = package.forward([token], state)
        steps.append(logits)
    logits, cache = run(our_model(weights), ids, [T])
    assert_close(logits, torch.stack(steps))
    assert_close(official_state(cache), state)


def test_continuing_a_state_of_the_package():
    """A state made by the package, not symmetric in anything, goes on in ours."""
    weights, ids = random_official_rwkv7(C=64, N=32), random_ids(T, vocab_size=37).tolist()
    _, state = official_logits(weights, ids[:17])
    expected, final = official_logits(weights, ids[17:], [s.clone() for s in state])
    model = our_model(weights)
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        shift, S, ffn_shift = state[3 * layer : 3 * layer + 3]
        cache.update_conv_state(shift[None, :, None], layer, state_idx=0, conv_kernel_size=1)
        cache.update_conv_state(ffn_shift[None, :, None], layer, state_idx=1, conv_kernel_size=1)
        cache.update_recurrent_state(S.mT[None].contiguous(), layer)
    logits, cache = run(model, ids[17:], [T - 17], cache)
    assert_close(logits, expected)
    assert_close(official_state(cache), final)


@pytest.mark.parametrize(
    "shape", [{"A": 64, "C": 32, "N": 16}, {"A": 32, "C": 96, "N": 32}, {"ranks": (1, 1, 1, 1)}], ids=str
)
def test_ours_equals_oracle_where_the_package_cannot_go(shape):
    """Attention narrower or wider than the residual, and ranks of one."""
    weights, ids = random_official_rwkv7(**shape), random_ids(T, vocab_size=37).tolist()
    expected, final = Rwkv7(weights).forward(ids)
    logits, cache = run(our_model(weights), ids, [9, T - 9])
    assert_close(logits, torch.tensor(expected))
    assert_close(official_state(cache), [torch.tensor(s) for s in final])


@pytest.mark.parametrize("T", [12, 34])
def test_gradients_equal_differences_of_the_oracle(T):
    """Every tensor's gradient against central differences of the float64 oracle, along a random direction."""
    weights = random_official_rwkv7(L=2, C=16, N=8, V=11)
    ids, generator, step = random_ids(T, vocab_size=11).tolist(), torch.Generator().manual_seed(0), 1e-4
    readout = torch.randn(T, 11, generator=generator)
    model = our_model(weights).train()
    (model(torch.tensor(ids)[None]).logits[0] * readout).sum().backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}

    def loss(changed: dict) -> float:
        return float((Rwkv7(changed).forward(ids)[0] * readout.numpy()).sum())

    for name, tensor in weights.items():
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        up, down = ({**weights, name: tensor.double() + sign * step * direction} for sign in (1, -1))
        expected = (loss(up) - loss(down)) / (2 * step)
        along = our_weights({n: direction if n == name else torch.zeros_like(t) for n, t in weights.items()})
        ours = sum(float((gradient[n].double() * d).sum()) for n, d in along.items())
        size = sum(float(gradient[n].norm() * d.norm()) for n, d in along.items())
        assert abs(ours - expected) <= TOLERANCE[torch.float32] * max(size, 1.0), f"{name}: {ours} and {expected}"


@pytest.mark.parametrize("name", ["w0", "a0", "g2", "key.weight"])
def test_extreme_weights(name):
    """Saturated decay, rate and gate, and keys of large norm."""
    weights, ids = random_official_rwkv7(C=64, N=32), random_ids(T, vocab_size=37).tolist()
    for key in weights:
        if key.endswith(f"att.{name}"):
            weights[key] = weights[key] * 20
    official, _ = official_logits(weights, ids)
    logits, _ = run(our_model(weights), ids, [T])
    assert torch.isfinite(logits).all()
    expected, _ = Rwkv7(weights).forward(ids)
    ours, theirs = ((x.double() - torch.tensor(expected)).abs().max().item() for x in (logits, official))
    assert ours <= max(TOLERANCE[torch.float32], 2 * theirs)


@pytest.mark.parametrize("slices", [[T], [1] * T], ids=["sequence", "steps"])
def test_bfloat16_is_close_to_the_package(case, slices):
    weights, ids = case
    weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    official, _ = official_logits(weights, ids, dtype="bf16")
    logits, cache = run(our_model(weights, torch.bfloat16), ids, slices)
    assert_close(logits, official, torch.bfloat16)
    assert all(layer.recurrent_states[0].dtype == torch.float32 for layer in cache.layers)


def test_bfloat16_is_as_exact_as_the_package():
    """Over all shapes together, our squared distance from the float64 oracle is not larger than the package's."""
    ours = theirs = 0.0
    for shape in SHAPES.values():
        for seed in range(2):
            weights = random_official_rwkv7(**{"V": 37, "seed": seed, **shape})
            weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
            ids = random_ids(T, vocab_size=37, seed=seed).tolist()
            exact = torch.tensor(Rwkv7(weights).forward(ids)[0])
            logits, _ = run(our_model(weights, torch.bfloat16), ids, [T])
            ours += (logits - exact).square().mean()
            theirs += (official_logits(weights, ids, dtype="bf16")[0] - exact).square().mean()
    assert ours <= theirs, f"mean squared errors: ours {ours:.5f}, the package {theirs:.5f}"
