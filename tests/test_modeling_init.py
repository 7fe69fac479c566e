"""Initialisation per tensor: what `from_config` draws is what the official trainer draws.

Letters: L layers, l the layer, C width, A attention width, N head size, V vocabulary.
"""

import math

import numpy as np
import pytest
import torch
from conftest import AUTO_CLASSES, TINY, busy_model, tiny_config
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification


def assert_orthogonal(weight: torch.Tensor, gain: float):
    """Rows, or columns where there are fewer of them, are orthogonal with norm `gain`; and random."""
    short = weight if weight.shape[0] <= weight.shape[1] else weight.T
    torch.testing.assert_close(short @ short.T, gain**2 * torch.eye(short.shape[0]), rtol=0, atol=1e-5)
    assert weight.unique().numel() > 0.9 * weight.numel()


def assert_vector(parameter: torch.Tensor, expected: np.ndarray | float):
    expected = torch.as_tensor(np.broadcast_to(expected, parameter.numel()).copy(), dtype=torch.float64)
    torch.testing.assert_close(parameter.flatten().double(), expected, rtol=0, atol=2e-6)


class Parameters:
    """The parameters of a model by name, and which of them have been looked at."""

    def __init__(self, model):
        self.tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
        self.seen = set()

    def __call__(self, name: str) -> torch.Tensor:
        self.seen.add(name)
        return self.tensors[name]

    def check_ends(self, config, embeddings: str, head: str, norms: list[str]):
        """What all generations have in common."""
        V, C = config.vocab_size, config.hidden_size
        emb = self(embeddings)
        assert emb.abs().max() <= 1e-4
        assert emb.max() > 0.99e-4
        assert emb.min() < -0.99e-4
        assert abs(emb.mean()) < 5e-6
        assert_orthogonal(self(head), 0.5 * math.sqrt(V / C) if V > C else 0.5)
        for norm in norms:
            assert_vector(self(f"{norm}.weight"), 1)
            assert_vector(self(f"{norm}.bias"), 0)


def ratios(layer: int, L: int) -> tuple[float, float]:
    """l / (L - 1) and 1 - l / L."""
    return layer / max(L - 1, 1), 1 - layer / L


def check_rwkv7(at: Parameters, config):
    C, A, N, L = config.hidden_size, config.attention_hidden_size, config.head_dim, config.num_hidden_layers
    ddd, n = np.arange(C) / C, np.arange(A)
    lin = n / (A - 1) - 0.5
    z = (n % N - (N - 1) / 2) / ((N - 1) / 2)
    zig = z * np.abs(z)
    norms = ["model.norm", "model.layers.0.pre_norm"]
    norms += [f"model.layers.{layer}.{kind}_norm" for layer in range(L) for kind in ("attn", "ffn")]
    at.check_ends(config, "model.embeddings.weight", "lm_head.weight", norms)
    for layer in range(L):
        r01, r10 = ratios(layer, L)
        att, ffn = f"model.layers.{layer}.attn.", f"model.layers.{layer}.ffn."
        for letter, power in {"r": 0.2, "g": 0.2, "w": 0.9, "a": 0.9, "k": 0.7, "v": 0.7}.items():
            assert_vector(at(f"{att}x_{letter}"), 1 - ddd ** (power * r10))
        assert_vector(at(att + "w_lora.lora.2.bias"), -6 + 6 * (n / (A - 1)) ** (1 + r01**0.3) + 0.5 + 2.5 * zig)
        assert_vector(at(att + "a_lora.lora.2.bias"), -0.19 + 0.3 * zig + 0.4 * lin)
        if layer > 0:
            assert_vector(at(att + "v_lora.lora.2.bias"), 0.73 - 0.4 * lin)
        for letter in "wag" if layer == 0 else "wavg":
            assert_vector(at(f"{att}{letter}_lora.lora.0.weight"), 0)
            up = at(f"{att}{letter}_lora.lora.2.weight")
            assert_orthogonal(up, 0.1 * max(1, math.sqrt(up.shape[1] / up.shape[0])))
        assert_vector(at(att + "k_k"), 0.71 - 0.1 * lin)
        assert_vector(at(att + "k_a"), 1.02)
        assert_vector(at(att + "r_k"), -0.04)
        assert_orthogonal(at(att + "r_proj.weight"), 1)
        assert_orthogonal(at(att + "k_proj.weight"), 0.1)
        assert_orthogonal(at(att + "v_proj.weight"), 1)
        assert_vector(at(att + "o_proj.weight"), 0)
        assert_vector(at(att + "g_norm.weight"), ((1 + layer) / L) ** 0.7)
        assert_vector(at(att + "g_norm.bias"), 0)
        assert_vector(at(ffn + "x_k"), 1 - ddd ** (r10**4))
        assert_orthogonal(at(ffn + "key.weight"), 1)
        assert_vector(at(ffn + "value.weight"), 0)


def blocks(at: Parameters, config):
    """Checks what RWKV-4, 5 and 6 share around their blocks; yields the letters of each block's formulas."""
    C, L = config.hidden_size, config.num_hidden_layers
    norms = [f"rwkv.blocks.{layer}.ln{i}" for layer in range(L) for i in (1, 2)]
    at.check_ends(config, "rwkv.embeddings.weight", "head.weight", ["rwkv.ln_out", "rwkv.blocks.0.pre_ln", *norms])
    ddd = np.arange(C) / C
    for layer in range(L):
        att, ffn = (f"rwkv.blocks.{layer}.{part}." for part in ("attention", "feed_forward"))
        for name in (f"{att}output", f"{ffn}value", f"{ffn}receptance"):
            assert_vector(at(f"{name}.weight"), 0)
        yield att, ffn, ddd, layer, *ratios(layer, L)


def raw_decay(low: float, span: float, n: int, r01: float) -> np.ndarray:
    return low + span * (np.arange(n) / (n - 1)) ** (0.7 + 1.3 * r01)


def zigzag(n: int) -> np.ndarray:
    return (np.arange(n) + 1) % 3 - 1


def check_rwkv(at: Parameters, config):
    A = config.attention_hidden_size
    for att, ffn, ddd, _, r01, r10 in blocks(at, config):
        assert_vector(at(att + "time_decay"), raw_decay(-5, 8, A, r01))
        assert_vector(at(att + "time_first"), math.log(0.3) + 0.5 * zigzag(A))
        check_mixes(at, att, ffn, ddd, r01, r10)
        for name in ("key", "receptance"):
            assert_vector(at(f"{att}{name}.weight"), 0)
        for name in (f"{att}value", f"{ffn}key"):
            weight = at(f"{name}.weight")
            assert_orthogonal(weight, max(1, math.sqrt(weight.shape[0] / weight.shape[1])))


def check_mixes(at: Parameters, att: str, ffn: str, ddd, r01: float, r10: float):
    """The token-shift mixes of RWKV-4 and 5."""
    assert_vector(at(att + "time_mix_key"), ddd**r10)
    assert_vector(at(att + "time_mix_value"), ddd**r10 + 0.3 * r01)
    assert_vector(at(att + "time_mix_receptance"), ddd ** (0.5 * r10))
    assert_vector(at(ffn + "time_mix_key"), ddd**r10)
    assert_vector(at(ffn + "time_mix_receptance"), ddd**r10)


def check_headed(at: Parameters, config, att: str, ffn: str, layer: int):
    """The matrices and the group norm of RWKV-5 and 6."""
    gains = {f"{att}receptance": 1, f"{att}value": 1, f"{att}key": 0.1, f"{ffn}key": 1}
    if getattr(config, "use_gate", True):
        gains[f"{att}gate"] = 0.1
    for name, gain in gains.items():
        assert_orthogonal(at(f"{name}.weight"), gain)
    assert_vector(at(att + "ln_x.weight"), ((1 + layer) / config.num_hidden_layers) ** 0.7)
    assert_vector(at(att + "ln_x.bias"), 0)


def check_rwkv5(at: Parameters, config):
    for att, ffn, ddd, layer, r01, r10 in blocks(at, config):
        n = config.num_heads if config.decay_per_head else config.attention_hidden_size
        assert_vector(at(att + "time_decay"), raw_decay(-6, 5, n, r01))
        channels = np.zeros(n) if config.decay_per_head else 0.1 * zigzag(n)
        if config.bonus_is_log:
            assert_vector(at(att + "time_first"), -3)
        else:
            assert_vector(at(att + "time_faaaa"), r01 * (1 - np.arange(n) / (n - 1)) + channels)
        if config.use_gate:
            assert_vector(at(att + "time_mix_gate"), ddd ** (0.5 * r10))
        check_mixes(at, att, ffn, ddd, r01, r10)
        check_headed(at, config, att, ffn, layer)


def check_rwkv6(at: Parameters, config):
    A = config.attention_hidden_size
    for att, ffn, ddd, layer, r01, r10 in blocks(at, config):
        for letter in "xwk":
            assert_vector(at(f"{att}time_maa_{letter}"), 1 - ddd**r10)
        assert_vector(at(att + "time_maa_v"), 1 - (ddd**r10 + 0.3 * r01))
        for letter in "rg":
            assert_vector(at(f"{att}time_maa_{letter}"), 1 - ddd ** (0.5 * r10))
        for letter in "kr":
            assert_vector(at(f"{ffn}time_maa_{letter}"), 1 - ddd ** (r10**3))
        for name in ("time_maa", "time_decay"):
            assert_vector(at(f"{att}{name}_w1"), 0)
            up = at(f"{att}{name}_w2")
            assert up.abs().max() <= 0.01
            assert up.min() < -0.009
            assert up.max() > 0.009
        assert_vector(at(att + "time_decay"), raw_decay(-6, 5, A, r01))
        assert_vector(at(att + "time_faaaa"), r01 * (1 - np.arange(A) / (A - 1)) + 0.1 * zigzag(A))
        check_headed(at, config, att, ffn, layer)


# The projections through which the first gradient comes.
ZERO_AT_FIRST = ("o_proj.weight", "output.weight", "ffn.value.weight", "feed_forward.value.weight")
CHECKS = {"rwkv": check_rwkv, "rwkv5": check_rwkv5, "rwkv6": check_rwkv6, "rwkv7": check_rwkv7}
# Each reaches another branch of the table: L = 1, V above and below C, A other than C, and what a generation alone has.
VARIANTS = {
    "tiny": {},
    "one-layer": {"num_hidden_layers": 1},
    "two-layers": {"num_hidden_layers": 2},
    "large-vocabulary": {"vocab_size": 300},
    "wide-attention": {"attention_hidden_size": 96},
}
OWN_VARIANTS = {
    "rwkv5-5.0": ("rwkv5", {"use_gate": False, "decay_per_head": True, "bonus_is_log": True}),
    "rwkv5-5.1": ("rwkv5", {"decay_per_head": True}),
    "rwkv7-rank-above-width": ("rwkv7", {"gate_low_rank_dim": 100}),
}
CASES = {f"{kind}-{name}": (kind, changes) for kind in TINY for name, changes in VARIANTS.items()} | OWN_VARIANTS


def check(model, config):
    """The table of the generation holds for every parameter."""
    at = Parameters(model)
    CHECKS[config.model_type](at, config)
    assert at.seen == set(at.tensors)


@pytest.mark.parametrize("model_type, changes", CASES.values(), ids=CASES)
def test_from_config(model_type, changes):
    config = tiny_config(model_type, **changes)
    check(AutoModelForCausalLM.from_config(config), config)


def test_every_generation_has_a_check():
    assert set(CHECKS) == set(TINY)


def test_after_meta_device(model_type):
    """Built without storage and initialised afterwards, as from_pretrained and FSDP build models."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(float("nan"))
    model.init_weights()
    check(model, config)


def test_initialisation_is_seeded(model_type):
    first, second, third = (
        (torch.manual_seed(seed), AutoModelForCausalLM.from_config(tiny_config(model_type)))[1] for seed in (0, 0, 1)
    )
    pairs = list(zip(first.parameters(), second.parameters(), third.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_loaded_tensors_are_never_drawn_again(model_type):
    """A module with some tensors loaded and some not: the loaded ones stay as they are.

    The time-mix owns many tensors at once; that the loader marks each of them must be respected one by one.
    """
    model = busy_model(model_type)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    redrawn = {name for i, name in enumerate(before) if i % 3 == 0}
    for name, p in model.named_parameters():
        p._is_hf_initialized = name not in redrawn
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    for name, p in model.named_parameters():
        if name not in redrawn:
            assert torch.equal(p, before[name]), f"{name} was loaded and drawn again"
        else:
            assert not torch.equal(p, before[name]), f"{name} was missing and not drawn"


def test_a_new_head_on_loaded_weights(model_type, tmp_path):
    """A classifier on a language model: the backbone is bit for bit the saved one, the head is drawn."""
    model = busy_model(model_type)
    model.save_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    saved = model.base_model.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in classifier.base_model.state_dict().items())
    score = classifier.score.weight
    assert score.shape == (3, model.config.hidden_size)
    assert torch.isfinite(score).all()
    assert score.abs().max() > 0


@pytest.mark.parametrize("auto_class", AUTO_CLASSES, ids=lambda c: c.__name__)
def test_forward_of_a_fresh_model_is_finite_and_trains(model_type, auto_class):
    model = auto_class.from_config(tiny_config(model_type)).train()
    out = model(torch.arange(1, 9)[None])[0]
    assert torch.isfinite(out).all()
    out.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
    # Zero output projections get the first gradient; the inside of the blocks follows one step later.
    assert any(g.abs().max() > 0 for name, g in gradients.items() if name.endswith(ZERO_AT_FIRST))
