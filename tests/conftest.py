"""What the tests share: one table of tiny configurations, one of tolerances, and models whose every part is at work.

A generation is one row of TINY; the model tests run on every row.
"""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

import wkv  # noqa: F401  (registers the model types)

collect_ignore = ["common"]

# Ranks and head count differ from each other and from every other size, so that no two can be mixed up unnoticed.
TINY = {
    "rwkv": {
        "vocab_size": 50,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "attention_hidden_size": 48,
        "intermediate_size": 96,
        "context_length": 64,
    },
    "rwkv5": {
        "vocab_size": 50,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "head_size": 16,
        "intermediate_size": 96,
        "context_length": 64,
    },
    "rwkv6": {
        "vocab_size": 50,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "head_size": 16,
        "intermediate_size": 96,
        "time_mix_extra_dim": 5,
        "time_decay_extra_dim": 7,
        "context_length": 64,
    },
    "rwkv7": {
        "vocab_size": 50,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "intermediate_size": 96,
        "decay_low_rank_dim": 5,
        "a_low_rank_dim": 3,
        "v_low_rank_dim": 7,
        "gate_low_rank_dim": 9,
        "max_position_embeddings": 64,
    },
}

# Error of logits of scale 5 by the model's dtype: the largest absolute one in float32, the root mean square in half
# precision, where single logits scatter.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.0125}

# Largest root mean square error of an operator's results and gradients, relative to their own, by their dtype.
OPERATOR_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}

# The auto classes that a generation is registered with.
AUTO_CLASSES = [AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification]

TRANSFORMERS_MARKERS = [
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "torch_compile_test",
]


def tiny_config(model_type: str, **changes):
    return AutoConfig.for_model(model_type, **{**TINY[model_type], **changes})


def busy_model(model_type: str, auto_class=AutoModelForCausalLM, seed: int = 0, **changes):
    """A tiny model in eval mode with every weight drawn anew: nothing is zero or closed, logits have a scale of 5.

    A freshly initialised RWKV is no test subject: its output projections are zero.
    """
    config = tiny_config(model_type, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(config).eval()
    return stir(model, seed)


def stir(model: torch.nn.Module, seed: int = 0):
    """Draw matrices with unit gain and move every other parameter away from its initial value, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            if "embed" in name:
                p.copy_(noise)
            elif sum(n > 1 for n in p.shape) == 2 and name.endswith(".weight"):
                gain = 2.0 if "head" in name or "score" in name else 1.0
                p.copy_(gain * p.shape[-1] ** -0.5 * noise)
            else:
                p.add_(0.2 * noise)
    return model


def time_mix(model: torch.nn.Module, layer: int = 0) -> torch.nn.Module:
    """The time-mix of a layer, whatever its generation calls it."""
    block = model.base_model.get_blocks()[layer]
    return block.attn if hasattr(block, "attn") else block.attention


def random_ids(*shape: int, seed: int = 0, vocab_size: int = 50) -> torch.Tensor:
    """Ids of real tokens: id 0 ends a text and pads."""
    return torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def states(cache, row: int | None = None) -> list[torch.Tensor]:
    """Every state tensor of a cache, layer by layer; with `row`, that row of the batch only."""
    tensors = [t for layer in cache.layers for d in (layer.conv_states, layer.recurrent_states) for t in d.values()]
    tensors = [t for t in tensors if t is not None]
    return tensors if row is None else [t[row : row + 1] for t in tensors]


def assert_close(actual, expected, dtype: torch.dtype = torch.float32, what: str = ""):
    """Compare tensors, or lists of tensors pairwise, by the one table of tolerances."""
    if isinstance(actual, torch.Tensor):
        actual, expected = [actual], [expected]
    assert len(actual) == len(expected) > 0
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.shape == y.shape, f"{what} [{i}]: shapes {tuple(x.shape)} and {tuple(y.shape)}"
        difference = (x.detach().double() - y.detach().double()).abs()
        error = difference.max() if dtype == torch.float32 else difference.square().mean().sqrt()
        # Written so that NaN fails.
        assert error <= TOLERANCE[dtype], f"{what} [{i}]: error {error:.3g}, allowed {TOLERANCE[dtype]:.3g} in {dtype}"


def assert_gradients_close(actual: dict, expected: dict):
    """Compare gradients by name, each within 1e-4 of the largest value that the expected one holds."""
    assert actual.keys() == expected.keys()
    for name, g in expected.items():
        assert g is not None and actual[name] is not None, f"{name} has no gradient"
        scale = max(g.abs().max().item(), 1e-3)
        error = (actual[name] - g).abs().max().item()
        assert error <= TOLERANCE[torch.float32] * scale, f"gradient of {name}: error {error:.2e} at scale {scale:.2e}"


def gradients(model) -> dict[str, torch.Tensor]:
    """Copies of the parameters' gradients, by name; clears them."""
    taken = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return taken


def pytest_configure(config):
    for name in TRANSFORMERS_MARKERS:
        config.addinivalue_line("markers", f"{name}: set by transformers' own tests")


@pytest.fixture(params=sorted(TINY))
def model_type(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def _busy_models():
    return {}


@pytest.fixture
def model(model_type, _busy_models):
    """A causal language model of this generation, shared by the tests: they must not change it."""
    if model_type not in _busy_models:
        _busy_models[model_type] = busy_model(model_type)
    return _busy_models[model_type]


@pytest.fixture
def own_model(model):
    """A copy of `model` that the test may change."""
    return copy.deepcopy(model)


USUAL_VERBOSITY = logging.get_verbosity()


@pytest.fixture(autouse=True)
def usual_messages():
    """Commands run in this process, also by fixtures of a module, quieten transformers; each test hears it again."""
    logging.set_verbosity(USUAL_VERBOSITY)
    logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def _seeded_and_single_threaded():
    """Tiny tensors gain nothing from threads and lose much on a busy machine; a test about threads sets them."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
