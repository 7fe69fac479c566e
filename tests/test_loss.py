"""The head's loss in chunks, and logits that wait for a reader, against the ordinary head and loss.

Letters: N tokens, C hidden width, V classes.
"""

import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import convert_to_fp32
from conftest import (
    OPERATOR_TOLERANCE,
    assert_close,
    assert_gradients_close,
    busy_model,
    gradients,
    random_ids,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from wkv.models import rwkv_loss, rwkv_models
from wkv.models.rwkv_loss import DeferredLogits, deferred_logits

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])


def error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@pytest.fixture(params=[2**26, 7 * 4 * 61], ids=["whole", "chunks"])
def chunks(request, monkeypatch):
    """All tokens at once, or 7 at a time (14 in half precision)."""
    monkeypatch.setattr(rwkv_loss, "CHUNK_BYTES", request.param)
    monkeypatch.setattr(rwkv_loss, "BLOCK_ROWS", 16)


def head(dtype=FP32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 50, 24, generator=generator).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(61, 24, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(61, (3, 50), generator=generator)
    labels[0, 5:20] = labels[2, :40] = -100
    return hidden, weight, labels


def learn(loss, *tensors):
    return loss.detach(), *torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "plain"])
@DTYPES
@pytest.mark.parametrize("items", [None, 70, torch.tensor(70)], ids=["mean", "int", "tensor"])
def test_loss_equals_the_ordinary_one(monkeypatch, chunks, compiled, dtype, items):
    """Against float64 logits of the same rounding, and no further off than head and loss in this dtype."""
    if not compiled:
        monkeypatch.setattr(rwkv_loss, "compiled_cross_entropy", None)
    hidden, weight, labels = head(dtype)
    ours = learn(deferred_logits(hidden, weight).loss(labels, items), hidden, weight)
    h, W = (x.detach().double().requires_grad_() for x in (hidden, weight))
    n = (labels[:, 1:] >= 0).sum() if items is None else items
    logits = (h @ W.T).to(dtype).double() if dtype != FP32 else h @ W.T
    exact = learn(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / n, h, W)
    ordinary = learn(ForCausalLMLoss(hidden @ weight.T, labels, 61, items), hidden, weight)
    assert error(ours[0], exact[0]) <= 1e-6
    for got, usual, right in zip(ours[1:], ordinary[1:], exact[1:], strict=True):
        assert got.dtype == dtype and got.shape == right.shape
        assert error(got, right) <= (
            1e-6 if dtype == FP32 else max(OPERATOR_TOLERANCE[dtype], 1.05 * error(usual, right))
        )


def test_sums_of_many_chunks_are_float32(monkeypatch):
    monkeypatch.setattr(rwkv_loss, "CHUNK_BYTES", 16)
    hidden = torch.ones(1, 4001, 4).bfloat16()
    weight = torch.zeros(4, 4, dtype=BF16).requires_grad_()
    labels = torch.zeros(1, 4001, dtype=torch.int64)
    (gradient,) = torch.autograd.grad(deferred_logits(hidden, weight).loss(labels), weight)
    assert_close(gradient.float(), torch.tensor([[-0.75], [0.25], [0.25], [0.25]]).expand(4, 4))


def test_float16_gradients_do_not_vanish(chunks):
    """A token's share is below what float16 holds until the loss scale has multiplied it."""
    hidden, weight, labels = head(FP16)
    _, *scaled = learn(2.0**24 * deferred_logits(hidden, weight).loss(labels, 2**24), hidden, weight)
    _, *expected = learn(ForCausalLMLoss(hidden.float() @ weight.float().T, labels, 61, 1), hidden, weight)
    assert all(error(x, y.double()) < 1e-2 for x, y in zip(scaled, expected, strict=True))


def test_other_labels(chunks):
    hidden, weight, labels = head()
    for arguments in ({"shift_labels": labels}, {"ignore_index": 7}, {"num_items_in_batch": 9, "shift_labels": labels}):
        given = labels.masked_fill(labels < 0, 7)
        ours = deferred_logits(hidden, weight).loss(given, **arguments)
        usual = ForCausalLMLoss(hidden @ weight.T, given, 61, **arguments)
        torch.testing.assert_close(learn(ours, hidden, weight), learn(usual, hidden, weight))


def test_what_is_not_counted_costs_nothing(chunks):
    """Neither padding nor the last token of a row is looked at: they may even be NaN."""
    hidden, weight, labels = head()
    counted = F.pad(labels, (0, 1), value=-100)[:, 1:] >= 0
    broken = hidden.detach().masked_fill(~counted.unsqueeze(-1), torch.nan).requires_grad_()
    loss, grad_hidden, grad_weight = learn(deferred_logits(broken, weight).loss(labels), broken, weight)
    rows, targets = hidden[counted].detach().unsqueeze(0).requires_grad_(), labels[:, 1:][counted[:, :-1]].unsqueeze(0)
    alone = learn(deferred_logits(rows, weight).loss(targets, shift_labels=targets), rows, weight)
    assert torch.equal(loss, alone[0]) and torch.equal(grad_weight, alone[2])
    assert torch.equal(grad_hidden[counted], alone[1][0]) and not grad_hidden[~counted].any()


@pytest.mark.parametrize("T", [1, 4])
def test_nothing_to_learn(T):
    hidden, weight = torch.randn(2, T, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    labels = torch.full((2, T), -100 if T > 1 else 1)
    loss, *grads = learn(deferred_logits(hidden, weight).loss(labels), hidden, weight)
    assert loss.isnan() and not any(g.any() for g in grads)
    assert deferred_logits(hidden, weight).loss(labels, 4) == 0


def test_only_what_is_wanted(chunks):
    """Frozen hidden states or a frozen head get no gradient; a kept graph can be used again and scaled."""
    hidden, weight, labels = head()
    _, grad_hidden, grad_weight = learn(deferred_logits(hidden, weight).loss(labels), hidden, weight)
    frozen = deferred_logits(hidden, weight.detach()).loss(labels)
    for scale in (1, 3, 1):
        assert_close(torch.autograd.grad(scale * frozen, hidden, retain_graph=True)[0], scale * grad_hidden)
    assert_close(learn(deferred_logits(hidden.detach(), weight).loss(labels), weight)[1], grad_weight)


def test_labels_that_do_not_fit():
    hidden, weight, labels = head()
    with pytest.raises(ValueError, match="150 tokens have logits, but 147 labels"):
        deferred_logits(hidden, weight).loss(labels[:, 1:])
    labels[1, 7] = 61
    with pytest.raises(IndexError, match="target 61 is out of bounds"):
        deferred_logits(hidden, weight).loss(labels)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def in_place(x):
    x.div_(2)
    x[:, 0] = 0
    x[:, 1:3].mul_(3)
    return x + 0


READERS = {
    "product": lambda x: x * 2,
    "slice": lambda x: x[:, :-1] ** 2,
    "float": lambda x: x.float() * 2,
    "dtypes": lambda x: x.to(BF16).double().sin(),
    "function": Square.apply,
    "checkpoint": lambda x: checkpoint(torch.sin, x, use_reentrant=True),
    "in place": in_place,
    "iteration": lambda x: torch.stack(list(x)),
    "vmap": lambda x: torch.vmap(torch.sin)(x),
    "compiled": lambda x: torch.compile(torch.sin, backend="eager")(x),
    "second order": lambda x: torch.autograd.grad((x**3).sum(), x, create_graph=True)[0],
    "out": lambda x: torch.add(x.detach(), 1, out=torch.empty(x.shape)),
    "detached": lambda x: torch.from_numpy(x.detach().numpy()),
    "list": lambda x: torch.tensor(x.tolist()),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)).detach(),
    "text": lambda x: torch.tensor([float(n) for n in str(x.detach()[0, 0, :3])[8:-2].split(",")]),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_who_reads_the_logits_gets_them(read):
    results = []
    for make in (deferred_logits, F.linear):
        hidden, weight, _ = head()
        # Not leaves, as in a model: in-place changes are allowed.
        out = read(make(hidden * 1, weight))
        if out.requires_grad:
            out.square().sum().backward()
        results.append((out.detach(), hidden.grad, weight.grad))
    torch.testing.assert_close(*results)


@pytest.fixture
def model(chunks):
    return busy_model("rwkv7", vocab_size=61).train()


IDS = random_ids(2, 21, vocab_size=61)
LABELS = IDS.masked_fill(torch.arange(21) < torch.tensor([[4], [0]]), -100)


def ordinary(monkeypatch, function, *arguments):
    with monkeypatch.context() as context:
        context.setattr(rwkv_models, "may_defer", lambda *_: False)
        return function(*arguments)


def step(model, dtype=None, **inputs):
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        out = model(IDS, **{"labels": LABELS, **inputs})
    out.loss.backward()
    return out.loss.detach(), gradients(model), out.logits


def test_training_step(model, monkeypatch):
    keep = {"logits_to_keep": 9, "labels": LABELS[:, -9:]}
    for inputs in ({}, {"num_items_in_batch": 100}, {"attention_mask": (LABELS >= 0).long()}, keep):
        loss, grads, logits = step(model, **inputs)
        assert type(logits) is DeferredLogits and logits.values is None
        expected_loss, expected, expected_logits = ordinary(monkeypatch, lambda inputs=inputs: step(model, **inputs))
        assert type(expected_logits) is torch.Tensor
        torch.testing.assert_close(loss, expected_loss)
        assert_gradients_close(grads, expected)
        assert_close(logits, expected_logits)
    model.gradient_checkpointing_enable()
    assert_gradients_close(step(model)[1], ordinary(monkeypatch, step, model)[1])


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_training_step_in_bfloat16(model, monkeypatch, autocast):
    """Not further from float32 than the ordinary head and loss."""
    _, exact, _ = step(model)
    dtype = BF16 if autocast else None
    if not autocast:
        model.to(BF16)
    loss, grads, logits = step(model, dtype)
    expected_loss, expected, expected_logits = ordinary(monkeypatch, step, model, dtype)
    assert loss.dtype == FP32 and logits.dtype == BF16 and torch.equal(logits, expected_logits)
    torch.testing.assert_close(loss, expected_loss)
    ours, theirs = (sum(error(grads[name], g.double()) for name, g in exact.items()) for grads in (grads, expected))
    assert ours <= 1.1 * theirs
    assert error(grads["lm_head.weight"], exact["lm_head.weight"].double()) < 0.02


def test_outputs_hold_logits_as_ever(model):
    """However an output is taken apart or put together again, logits are there, and nobody has paid for them."""
    out = model(IDS, labels=LABELS)
    ways = [out.logits, out["logits"], out[1], out.to_tuple()[1], dict(out)["logits"], list(out.values())[1]]
    ways += [model(IDS, labels=LABELS, return_dict=False)[1], convert_to_fp32(out).logits]
    with torch.autocast("cpu", BF16):
        ways.append(convert_to_fp32(model(IDS, labels=LABELS)).logits)
    assert all(type(x) is DeferredLogits and x.values is None and x.dtype == FP32 for x in ways)
    logits = model.eval()(IDS).logits
    assert type(logits) is torch.Tensor
    for x in ways[:-1]:
        assert_close(x, logits)
    assert_close(ways[-1], logits, BF16)


def test_logits_after_an_optimizer_step(model):
    out = model(IDS, labels=LABELS)
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="read the logits before the optimizer's step"):
        out.logits.argmax(-1)


def double_output(module, inputs, output):
    return 2 * output


@pytest.mark.parametrize("change", ["hook", "bias", "loss", "eval", "no_grad", "forward"])
def test_head_or_loss_that_does_more_is_called(model, monkeypatch, change):
    linear = model.lm_head
    if change == "hook":
        linear.register_forward_hook(double_output)
    if change == "bias":
        linear.bias = torch.nn.Parameter(torch.ones(61))
    if change == "forward":
        linear.forward = lambda x: 2 * F.linear(x, linear.weight)
    if change == "loss":
        model.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    model.train(change != "eval")
    with torch.set_grad_enabled(change != "no_grad"):
        out = model(IDS, labels=LABELS)
        expected = ordinary(monkeypatch, lambda: model(IDS, labels=LABELS))
    assert (type(out.logits) is DeferredLogits) == (change == "loss")
    torch.testing.assert_close(out.loss, expected.loss)
    assert_close(out.logits, expected.logits)


def test_distributed(model, tmp_path):
    """DistributedDataParallel looks for tensors in the output to find what the loss does not use."""
    _, expected, _ = step(model)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for options in ({"find_unused_parameters": True}, {"static_graph": True}):
            wrapper = DistributedDataParallel(model, **options)
            wrapper(IDS, labels=LABELS).loss.backward()
            assert_gradients_close(gradients(model), expected)
    finally:
        torch.distributed.destroy_process_group()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation made, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if type(x) is torch.Tensor:
                self.bytes = max(self.bytes, x.nbytes)
        return out


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_all_logits_never_exist(dtype):
    """2048 tokens and 65536 classes would be 512 MB; no tensor of a step is above 64 MB."""
    model = busy_model("rwkv7", vocab_size=65536, num_hidden_layers=1).to(dtype).train()
    ids = random_ids(1, 2048, vocab_size=65536)
    with Largest() as largest:
        model(ids, labels=ids).loss.backward()
    assert 2**25 <= largest.bytes <= rwkv_loss.CHUNK_BYTES == 2**26
