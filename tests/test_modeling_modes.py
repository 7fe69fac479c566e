"""One model, many ways to run it: every mode gives the result of the plain forward.

Letters: B rows, T tokens.
"""

import copy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import assert_close, assert_gradients_close, busy_model, gradients, random_ids, states

T = 21
LEFT = torch.tensor([[0] * 4 + [1] * 17, [1] * 21])
PACKED = {"position_ids": torch.cat([torch.arange(8), torch.arange(13)]).expand(2, T)}
INPUTS = {"plain": {}, "padded": {"attention_mask": LEFT}, "packed": PACKED}


@pytest.fixture(params=INPUTS.values(), ids=INPUTS)
def inputs(request):
    return request.param


def backward(model, ids, readout, **inputs):
    (model(ids, **inputs).logits * readout).sum().backward()
    return gradients(model)


def operator(model):
    """The module that calls the WKV operator, the operator's name there, and its implementations by kind."""
    modelling = sys.modules[type(model).__module__]
    op = next(name for name in dir(modelling) if name.startswith("wkv") and callable(getattr(modelling, name)))
    home = sys.modules[getattr(modelling, op).__module__]
    parallel = next(name for name in (f"chunk_{op}", f"scan_{op}") if hasattr(home, name))
    kinds = {"dispatching": op, "naive_recurrent": f"naive_recurrent_{op}", "parallel": parallel}
    return modelling, op, {kind: getattr(home, name) for kind, name in kinds.items()}


def without_kernels(model, monkeypatch, kind: str):
    """Make the model run its plain PyTorch: no compiled part, and this kind of the WKV operator."""
    modelling, op, implementations = operator(model)
    monkeypatch.setattr(modelling, op, implementations[kind])
    for name, module in list(sys.modules.items()):
        for attribute in dir(module) if name.startswith("wkv.models.") else ():
            if attribute.startswith(("compiled", "few_rows", "wkv_kernels")):
                monkeypatch.setattr(module, attribute, None)


@pytest.mark.parametrize("kind", ["naive_recurrent", "parallel"])
def test_kernels_equal_plain_pytorch(own_model, inputs, kind, monkeypatch):
    """What this machine dispatches to against the definition, inside the model: logits, state, gradients.

    Padding too: the loss predicts the first token of a row from the padding on its left.
    """
    ids, readout = random_ids(2, T), torch.randn(2, T, own_model.config.vocab_size)

    def everything():
        with torch.no_grad():
            out = own_model(ids, use_cache=True, **inputs)
        return out.logits, states(out.past_key_values), backward(own_model, ids, readout, **inputs)

    logits, state, grads = everything()
    without_kernels(own_model, monkeypatch, kind)
    plain_logits, plain_state, plain_grads = everything()
    assert_close(logits, plain_logits)
    assert_close(state, plain_state)
    assert_gradients_close(grads, plain_grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_equal_plain_pytorch_in_half_precision(own_model, dtype, monkeypatch):
    """Whole text and one token at a time; kernels keep in float32 what plain PyTorch rounds in between."""
    own_model.to(dtype)
    ids, logits = random_ids(2, T), []
    for kernels in (True, False):
        if not kernels:
            without_kernels(own_model, monkeypatch, "parallel")
        with torch.no_grad():
            whole, cache, steps = own_model(ids).logits, None, []
            for t in range(T):
                out = own_model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits)
        logits.append((whole, torch.cat(steps, 1)))
    for kernel, plain in zip(*logits, strict=True):
        assert_close(kernel, plain, dtype)


def test_without_the_compiled_package(model_type, model, tmp_path):
    """A process in which wkv_kernels cannot be imported: one warning, same results."""
    script = """
        import logging, sys, torch
        sys.modules["wkv_kernels"] = None
        records = []
        handler = logging.Handler()
        handler.emit = records.append
        logging.getLogger("wkv").addHandler(handler)
        torch.set_num_threads(1)
        from conftest import busy_model, random_ids, states
        model, ids = busy_model(sys.argv[1]), random_ids(2, 75)
        out = model(ids, labels=ids, use_cache=True)
        out.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        assert not [name for name in sys.modules if name.startswith("wkv_kernels.")]
        with torch.no_grad():
            assert model.to("meta")(ids.to("meta")).logits.is_meta
        messages = [r.getMessage() for r in records if r.levelno >= logging.WARNING]
        torch.save((out.logits.detach(), states(out.past_key_values), grads, messages), sys.argv[2])
    """
    result = tmp_path / "result.pt"
    command = [sys.executable, "-c", textwrap.dedent(script), model_type, str(result)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits, state, grads, messages = torch.load(result)
    assert len(messages) == 1, messages
    assert "kernels" in messages[0]

    model, ids = copy.deepcopy(model), random_ids(2, 75)
    out = model(ids, labels=ids, use_cache=True)
    out.loss.backward()
    assert_close(logits, out.logits)
    # Sums over 75 tokens are up to 80 large where logits are 5, and so is their rounding.
    for mine, theirs in zip(state, states(out.past_key_values), strict=True):
        scale = max(1.0, theirs.abs().max().item() / 5)
        assert_close(mine / scale, theirs / scale)
    assert_gradients_close(grads, gradients(model))


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(own_model, inputs, reentrant):
    """Equal gradients everywhere, so also through the values that layer 0 hands to all others."""
    model, ids = own_model.train(), random_ids(2, T)
    readout = torch.randn(2, T, model.config.vocab_size)
    expected = backward(model, ids, readout, **inputs)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_gradients_close(backward(model, ids, readout, **inputs), expected)


def test_backward_of_a_forward_on_a_cache(own_model, monkeypatch):
    """The cache is overwritten in place; the backward pass still sees the state that the forward began with."""
    ids, readout = random_ids(2, T), torch.randn(2, 9, own_model.config.vocab_size)
    with torch.no_grad():
        cache = own_model(ids[:, :12], use_cache=True).past_key_values
    got = backward(own_model, ids[:, 12:], readout, past_key_values=copy.deepcopy(cache))
    monkeypatch.setattr(sys.modules[type(own_model).__module__], "write_state", lambda *args: None)
    assert_gradients_close(got, backward(own_model, ids[:, 12:], readout, past_key_values=cache))


def test_gradient_reaches_layer_0_through_v_first():
    """In RWKV-7, with layer 0's own output cut off, its value projection still learns."""
    own_model = busy_model("rwkv7")
    with torch.no_grad():
        own_model.model.layers[0].attn.o_proj.weight.zero_()
    for checkpointing in (False, True):
        if checkpointing:
            own_model.train().activation_checkpointing_enable()
        own_model(random_ids(2, T)).logits.square().sum().backward()
        assert gradients(own_model)["model.layers.0.attn.v_proj.weight"].abs().max() > 1e-3


def test_inputs_embeds_equal_input_ids(model, inputs):
    ids = random_ids(2, T)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(model(inputs_embeds=embeds, **inputs).logits, model(ids, **inputs).logits)


def test_logits_to_keep(model):
    ids = random_ids(2, T)
    with torch.no_grad():
        whole = model(ids).logits
        assert_close(model(ids, logits_to_keep=1).logits, whole[:, -1:])
        assert_close(model(ids, logits_to_keep=5).logits, whole[:, -5:])
        assert_close(model(ids, logits_to_keep=torch.tensor([0, 7, 3])).logits, whole[:, [0, 7, 3]])


def test_hidden_states(own_model):
    # transformers leaves its hooks on the blocks.
    model = own_model
    ids, L = random_ids(2, T), model.config.num_hidden_layers
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        assert len(out.hidden_states) == L + 1
        assert all(h.shape == (2, T, model.config.hidden_size) for h in out.hidden_states)
        assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
        assert torch.equal(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)
        assert model(ids).hidden_states is None


def test_tuple_output(model):
    ids = random_ids(2, T)
    with torch.no_grad():
        assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)


def test_loss(model):
    ids = random_ids(2, T)
    labels = ids.masked_fill(LEFT == 0, -100)
    with torch.no_grad():
        out = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_close(out.loss, expected)
    with torch.no_grad():
        summed = model(ids, labels=labels, num_items_in_batch=10).loss
    assert_close(summed, expected * (labels[:, 1:] >= 0).sum() / 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_on_cpu(own_model, dtype, inputs):
    ids = random_ids(2, T)
    with torch.no_grad():
        # The weights' own rounding is not the question here.
        for p in own_model.parameters():
            p.copy_(p.to(dtype))
        expected = own_model(ids, use_cache=True, **inputs)
        own_model.to(dtype)
        out = own_model(ids, use_cache=True, **inputs)
    real = inputs.get("attention_mask", torch.ones(2, T)) == 1
    assert out.logits.dtype == dtype
    assert_close(out.logits[real], expected.logits[real], dtype)
    for layer in out.past_key_values.layers:
        assert layer.recurrent_states[0].dtype == torch.float32
    own_model.train()(ids, labels=ids, **inputs).loss.backward()
    assert all(torch.isfinite(g).all() for g in gradients(own_model).values())


def test_operator_ignores_autocast(own_model, monkeypatch):
    """State and accumulators stay float32 under autocast, in every implementation."""
    modelling, op, implementations = operator(own_model)
    calls = []
    monkeypatch.setattr(modelling, op, lambda *args: calls.append(args) or implementations["dispatching"](*args))
    with torch.no_grad():
        own_model(random_ids(2, T))
    for kind, implementation in implementations.items():
        o, S = implementation(*calls[-1])
        with torch.autocast("cpu", torch.bfloat16):
            o_autocast, S_autocast = implementation(*calls[-1])
        assert torch.equal(o_autocast, o), kind
        assert torch.equal(S_autocast, S), kind


def test_autocast(own_model):
    """bfloat16 autocast over float32 weights, forward and backward."""
    ids = random_ids(2, T)
    expected = own_model(ids, labels=ids)
    expected.loss.backward()
    exact = gradients(own_model)
    with torch.autocast("cpu", torch.bfloat16):
        out = own_model(ids, labels=ids, use_cache=True)
    assert_close(out.logits, expected.logits, torch.bfloat16)
    assert all(layer.recurrent_states[0].dtype == torch.float32 for layer in out.past_key_values.layers)
    out.loss.backward()
    for name, g in gradients(own_model).items():
        assert torch.isfinite(g).all(), name
        cosine = torch.nn.functional.cosine_similarity(g.flatten(), exact[name].flatten(), dim=0)
        assert cosine > 0.98, f"{name}: {cosine}"
