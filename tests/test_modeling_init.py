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


def check_rwkv7(model, config):
    """The table of RWKV-7; returns the names of the parameters that it covers."""
    p = {name: tensor.detach() for name, tensor in model.named_parameters()}
    C, A, N, L, V = (
        config.hidden_size,
        config.attention_hidden_size,
        config.head_dim,
        config.num_hidden_layers,
        config.vocab_size,
    )
    ddd, n = np.arange(C) / C, np.arange(A)
    lin = n / (A - 1) - 0.5
    z = (n % N - (N - 1) / 2) / ((N - 1) / 2)
    zig = z * np.abs(z)
    seen = set()

    def at(name):
        seen.add(name)
        return p[name]

    emb = at("model.embeddings.weight")
    assert emb.abs().max() <= 1e-4
    assert emb.max() > 0.99e-4
    assert emb.min() < -0.99e-4
    assert abs(emb.mean()) < 5e-6
    assert_orthogonal(at("lm_head.weight"), 0.5 * math.sqrt(V / C) if V > C else 0.5)
    norms = ["model.norm", "model.layers.0.pre_norm"]
    norms += [f"model.layers.{layer}.{kind}_norm" for layer in range(L) for kind in ("attn", "ffn")]
    for norm in norms:
        assert_vector(at(f"{norm}.weight"), 1)
        assert_vector(at(f"{norm}.bias"), 0)
    for layer in range(L):
        r01, r10 = layer / max(L - 1, 1), 1 - layer / L
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
    assert seen == set(p)


CHECKS = {"rwkv7": check_rwkv7}
# Each reaches another branch of the table: L = 1, V above and below C, a rank above A, A other than C.
VARIANTS = {
    "tiny": {},
    "one-layer": {"num_hidden_layers": 1},
    "two-layers": {"num_hidden_layers": 2},
    "large-vocabulary": {"vocab_size": 300},
    "rank-above-width": {"gate_low_rank_dim": 100},
    "wide-attention": {"attention_hidden_size": 96},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_from_config(model_type, variant):
    config = tiny_config(model_type, **variant)
    CHECKS[model_type](AutoModelForCausalLM.from_config(config), config)


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
    CHECKS[model_type](model, config)


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
    saved = model.model.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in classifier.model.state_dict().items())
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
    assert any(g.abs().max() > 0 for name, g in gradients.items() if "o_proj" in name or "ffn.value" in name)
