"""The fused pieces of a RWKV-7 block against their definitions in plain PyTorch, in float64, and inside the model.

Letters: B batch rows, T tokens, C = A = H N channels, H heads of N.
"""

import copy
import os
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    OPERATOR_TOLERANCE,
    assert_close,
    assert_gradients_close,
    busy_model,
    gradients,
    random_ids,
    states,
)
from peft import LNTuningConfig, get_peft_model
from torch.utils import _pytree as pytree
from wkv_kernels import rwkv7_fused as kernels
from wkv_kernels.library import available_isas

from wkv.models import rwkv7_fused as pieces
from wkv.models import rwkv_fused
from wkv.models.rwkv_sequences import SequencePlan

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
EPS = 64e-5


def plain_mixes(x, before, mixes, dtype):
    if before is None or before.dim() == 2:
        return rwkv_fused.plain_shift_mix(x, before, SequencePlan(), mixes)[0]
    return [torch.addcmul(x, before - x, mix) for mix in mixes]


def plain_key_stage(raw_w, raw_k, *rest):
    # Two roundings to float32 are part of the definition; here the exact values are wanted.
    _, k, _, _ = pieces.plain_key_stage(raw_w, raw_k, *rest)
    raw_a, k_k, _, heads = rest
    kk = F.normalize((raw_k * k_k).unflatten(-1, (heads, -1)), dim=-1)
    log_w = (pieces.LOG_DECAY_SCALE * raw_w.sigmoid()).view_as(kk)
    return log_w, k, -kk, kk * raw_a.sigmoid().view_as(kk)


def plain_out_stage(o, r, k, v, g, r_k, weight, bias, eps):
    def norm(x):
        return F.group_norm(x, o.shape[2], weight, bias, eps)

    return pieces.plain_out_stage(norm, o, r, k, v, g, r_k)


DEFINITIONS = {
    "shift_mix": plain_mixes,
    "key_stage": plain_key_stage,
    "value_residual": pieces.plain_value_residual,
    "out_stage": plain_out_stage,
    "relu_squared": rwkv_fused.plain_relu_squared,
}
CASES = ["mix6", "mix6-carried", "mix3-each", "mix1", "key_stage", "value_residual", "out_stage", "relu_squared"]


class Draw:
    """Random tensors: those of tokens in one dtype and, if asked for, strided; parameters in another."""

    def __init__(self, seed, dtype=FP32, parameters=None, strided=False):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.parameters, self.strided = dtype, parameters or dtype, strided

    def rows(self, *shape):
        x = torch.randn(*shape, generator=self.generator).to(self.dtype)
        if self.strided and len(shape) > 2:
            x = torch.cat([torch.full_like(x, torch.nan), x], -1)[..., shape[-1] :]
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        return x

    def vector(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.parameters)


def make(case, draw, B, T, H, N):
    """The operator's name and its arguments."""
    A = H * N
    if case.startswith("mix"):
        count, _, before = case.removeprefix("mix").partition("-")
        shape = {"carried": (B, A), "each": (B, T, A)}.get(before)
        mixes = [draw.vector(A) for _ in range(int(count))]
        return "shift_mix", [draw.rows(B, T, A), draw.rows(*shape) if shape else None, mixes, draw.dtype]
    rows, heads = [draw.rows(B, T, A) for _ in range(3)], [draw.rows(B, T, H, N) for _ in range(4)]
    arguments = {
        "key_stage": [*rows, draw.vector(A), draw.vector(A), H],
        "value_residual": rows,
        "out_stage": [*heads, rows[0], draw.vector(H, N), draw.vector(A), draw.vector(A), EPS],
        "relu_squared": rows[:1],
    }
    return case, arguments[case]


def run(function, arguments, to=lambda x: x):
    """Outputs, and the gradients of all tensors among the arguments for a random gradient of the outputs."""
    leaves, structure = pytree.tree_flatten(arguments)
    leaves = [to(x).detach().requires_grad_() if isinstance(x, torch.Tensor) else x for x in leaves]
    outputs = pytree.tree_leaves(function(*pytree.tree_unflatten(leaves, structure)))
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(BF16).to(x) for x in outputs]
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    return outputs, torch.autograd.grad(outputs, tensors, upstream), tensors


def assert_parity(case, draw, *sizes, to=lambda x: x):
    name, arguments = make(case, draw, *sizes)
    outputs, found, inputs = run(getattr(kernels, name), arguments, to)
    exact_outputs, exact, _ = run(DEFINITIONS[name], arguments, torch.Tensor.double)
    assert all(g.dtype == x.dtype and g.shape == x.shape for g, x in zip(found, inputs, strict=True))
    results = {f"output {i}": pair for i, pair in enumerate(zip(outputs, exact_outputs, strict=True))}
    results |= {f"gradient {i}": pair for i, pair in enumerate(zip(found, exact, strict=True))}
    for what, (x, y) in results.items():
        assert x.shape == y.shape, what
        error = ((x.double().cpu() - y).norm() / y.norm()).item()
        assert error <= OPERATOR_TOLERANCE[x.dtype], f"{what}: error {error:.2e} in {x.dtype}"


@pytest.mark.parametrize("dtypes", [(FP32,), (BF16,), (FP16,), (BF16, FP32)], ids=["fp32", "bf16", "fp16", "mixed"])
@pytest.mark.parametrize("sizes", [(2, 75, 3, 64), (1, 40, 2, 20), (3, 1, 12, 64), (2, 33, 1, 600)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, sizes, dtypes):
    assert_parity(case, Draw(0, *dtypes), *sizes)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("case", CASES)
def test_random_calls(case, seed):
    choose = random.Random(seed)
    dtype, parameters = choose.choice((FP32, BF16, FP16)), choose.choice((FP32, BF16, FP16))
    sizes = choose.randint(1, 4), choose.randint(1, 90), choose.randint(1, 9), choose.randint(2, 80)
    assert_parity(case, Draw(seed, dtype, parameters, strided=choose.random() < 0.5), *sizes)


@pytest.mark.parametrize("isa", available_isas()[1:])
def test_every_instruction_set(isa):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-k", "parity", __file__]
    environment = {**os.environ, "WKV_ISA": isa, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("case", CASES)
def test_threads_do_not_change_a_bit(case):
    name, arguments = make(case, Draw(0, BF16, FP32), 2, 150, 4, 64)
    alone = run(getattr(kernels, name), arguments)
    torch.set_num_threads(2)
    together = run(getattr(kernels, name), arguments)
    for x, y in zip(pytree.tree_leaves(alone[:2]), pytree.tree_leaves(together[:2]), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("case", CASES)
def test_every_element_is_written(case):
    name, arguments = make(case, Draw(0), 2, 37, 3, 20)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
        outputs, found, _ = run(getattr(kernels, name), arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(x.isnan().any() for x in (*outputs, *found))


@pytest.mark.parametrize("case", CASES)
def test_operator_contract(case):
    name, arguments = make(case, Draw(0), 2, 5, 2, 8)
    arguments = pytree.tree_map_only(torch.Tensor, lambda x: x.requires_grad_(), arguments)
    torch.library.opcheck(getattr(torch.ops.wkv, f"rwkv7_{name}").default, arguments)


@pytest.mark.parametrize("key", [0, 3e-14])
def test_key_near_zero(key):
    """Its norm is taken for 1e-12, and has no gradient."""
    _, arguments = make("key_stage", Draw(0), 1, 3, 2, 16)
    arguments[1][:, 1, :16] = key
    outputs, found, _ = run(kernels.key_stage, arguments)
    exact_outputs, exact, _ = run(plain_key_stage, arguments, torch.Tensor.double)
    for x, y in zip([*outputs, *found], [*exact_outputs, *exact], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6)


def test_extreme_values():
    x = torch.tensor([-torch.inf, -1e30, -100.0, 0.0, 100.0, 1e30, torch.inf]).repeat(1, 1, 1)
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    assert kernels.value_residual(zero, one, x).tolist() == [[[0, 0, pytest.approx(0, abs=1e-38), 0.5, 1, 1, 1]]]
    log_w = kernels.key_stage(x, one, zero, one[0, 0], one[0, 0], 1)[0].flatten()
    torch.testing.assert_close(log_w, pieces.LOG_DECAY_SCALE * x.flatten().sigmoid())
    for function in (kernels.relu_squared, lambda x: kernels.value_residual(zero, one, x)):
        assert function(torch.full_like(x, torch.nan)).isnan().all()


def test_no_tokens():
    x, mixes = torch.zeros(2, 0, 8), [torch.ones(8, requires_grad=True)]
    (mixed,) = kernels.shift_mix(x, None, mixes, FP32)
    mixed.sum().backward()
    assert mixed.shape == x.shape and not mixes[0].grad.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, p: kernels.shift_mix(x[0], None, [p], FP32), "x must have 3 dimensions"),
        (lambda x, p: kernels.shift_mix(x, x[:1], [p], FP32), "before must have shape"),
        (lambda x, p: kernels.shift_mix(x, None, [p, p[:3]], FP32), r"mixes\[1\] must have 6 values, not 3"),
        (lambda x, p: kernels.shift_mix(x, None, [p] * 7, FP32), "1 to 6 mixes, not 7"),
        (lambda x, p: kernels.key_stage(x, x, x, p, p, 4), "heads must divide the 6 channels"),
        (lambda x, p: kernels.key_stage(x, x, x, p, p[1:], 2), "k_a must have 6 values"),
        (lambda x, p: kernels.value_residual(x, x.double(), x), "v_first must be float32, bfloat16 or float16"),
        (lambda x, p: kernels.relu_squared(x.long()), "x must be float32"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 4, 6), torch.zeros(6))


def test_second_derivative_is_refused():
    x = torch.ones(1, 2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(kernels.relu_squared(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


T = 21
INPUTS = {
    "plain": {},
    "padded": {"attention_mask": torch.tensor([[0] * 4 + [1] * 10 + [0] * 7, [1] * T])},
    "packed": {"position_ids": torch.tensor([[*range(8), *range(13)], list(range(T))])},
}


@pytest.fixture
def own():
    return busy_model("rwkv7")


def without_kernels(monkeypatch, function, *arguments, **options):
    with monkeypatch.context() as context:
        for module in (pieces, rwkv_fused):
            context.setattr(module, "is_compiled", lambda *_: False)
        return function(*arguments, **options)


def learn(model, dtype=None, **inputs):
    """Logits, and the gradients of all parameters."""
    ids = random_ids(2, T)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = model(ids, **inputs).logits
    readout = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    mask = inputs.get("attention_mask", torch.ones(2, T)).unsqueeze(-1)
    (logits.float() * readout * mask).sum().backward()
    return logits.detach().float() * mask, gradients(model)


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_model_with_and_without(own, monkeypatch, inputs):
    logits, grads = learn(own, **inputs)
    expected_logits, expected = without_kernels(monkeypatch, learn, own, **inputs)
    assert_close(logits, expected_logits)
    assert_gradients_close(grads, expected)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_model_in_half_precision(own, monkeypatch, dtype):
    """Not further from float32 than the definitions, which round more often."""
    exact, exact_grads = learn(own)
    half = copy.deepcopy(own).to(dtype)
    logits, grads = learn(half)
    expected_logits, expected = without_kernels(monkeypatch, learn, half)
    assert_close(logits, exact, dtype)

    def error(logits, grads):
        error = (logits - exact).norm() / exact.norm()
        return error, sum((grads[name] - g).norm() / g.norm() for name, g in exact_grads.items()) / len(grads)

    ours, theirs = error(logits, grads), error(expected_logits, expected)
    assert all(x <= 1.1 * y for x, y in zip(ours, theirs, strict=True)), (ours, theirs)


def test_model_under_autocast(own, monkeypatch):
    exact, exact_grads = learn(own)
    logits, grads = learn(own, BF16)
    _, expected = without_kernels(monkeypatch, learn, own, BF16)
    assert_close(logits, exact, BF16)
    assert all(g.dtype == FP32 for g in grads.values())
    ours, theirs = (
        sum((grads[name] - g).norm() / g.norm() for name, g in exact_grads.items()) for grads in (grads, expected)
    )
    assert ours <= 1.1 * theirs


def test_state_with_and_without(own, monkeypatch):
    def continued():
        with torch.inference_mode():
            cache = own(random_ids(2, T), use_cache=True, **INPUTS["padded"]).past_key_values
            logits = own(random_ids(2, 5, seed=1), past_key_values=cache).logits
        return [logits, *states(cache)]

    assert_close(continued(), without_kernels(monkeypatch, continued))


def double_output(module, inputs, output):
    return 2 * output


def hook(model):
    for layer in model.model.layers:
        layer.attn.g_norm.register_forward_hook(double_output)
    return model


def replace_forward(model):
    for layer in model.model.layers:
        norm = layer.attn.g_norm
        norm.forward = lambda x, norm=norm: 2 * type(norm).forward(norm, x)
    return model


def adapt(model):
    adapted = get_peft_model(model, LNTuningConfig(target_modules=["g_norm"]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "g_norm" in name and "default" in name:
                p.mul_(2)
    return adapted


@pytest.mark.parametrize("change", [hook, replace_forward, adapt])
def test_group_norm_that_does_more_is_called(own, monkeypatch, change):
    ids = random_ids(2, T)
    before = own(ids).logits
    changed = change(own)
    after = changed(ids).logits
    assert (after - before).abs().max() > 0.1
    assert_close(after, without_kernels(monkeypatch, changed, ids).logits)
