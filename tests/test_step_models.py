"""When models take the fused step: only where nothing else is wanted.

Letters: B rows.
"""

import pytest
import torch
from conftest import assert_close, busy_model, random_ids, states
from peft import LoraConfig, get_peft_model
from step_cases import IDS, call, decode, last_norm, module_by_module, part, path, plain_model, steps  # noqa: F401
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache


def hook(model):
    part(model, "attn.o_proj").register_forward_hook(lambda module, args, output: 0.5 * output)


def pre_hook(model):
    part(model, "ffn.value").register_forward_pre_hook(lambda module, args: (0.5 * args[0],))


def norm_hook(model):
    last_norm(model).register_forward_hook(lambda module, args, output: 0.5 * output)


def own_forward(model):
    linear = part(model, "attn.o_proj")
    linear.forward = lambda x: 0.5 * nn.functional.linear(x, linear.weight)


class Halved(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


def subclass(model):
    ffn = part(model, "ffn")
    old, ffn.key = ffn.key, Halved(ffn.key.in_features, ffn.key.out_features, bias=False)
    ffn.key.weight = old.weight


def other_class(model):
    part(model, "attn.o_proj").__class__ = Halved


def activation(model):
    if model.config.model_type != "rwkv7":
        pytest.skip("only RWKV-7 has modules for activations")
    part(model, "attn.g_lora").lora[1] = nn.Tanh()


def bias(model):
    part(model, "attn.o_proj").bias = nn.Parameter(torch.linspace(-1, 1, 64))


def no_affine(model):
    norm = last_norm(model)
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)


def parametrization(model):
    projection = part(model, "attn.o_proj")
    nn.utils.parametrizations.weight_norm(projection)
    projection.parametrizations.weight.original0.data.mul_(0.5)


def dora(model):
    options = {"use_dora": True, "init_lora_weights": False}
    get_peft_model(model, LoraConfig(target_modules=["key", path(model, "r_proj")], **options)).eval()


def eps(model):
    part(model, "ffn_norm").eps = 0.5


def group_eps(model):
    if model.config.model_type == "rwkv":
        pytest.skip("RWKV-4 has no group norm")
    part(model, "attn.g_norm").eps = 0.5


UNFIT = [hook, pre_hook, norm_hook, own_forward, subclass, other_class, activation, bias, no_affine, parametrization]
UNFIT += [dora, eps, group_eps]


@pytest.mark.parametrize("later", [False, True], ids=["from-the-start", "after-steps"])
@pytest.mark.parametrize("change", UNFIT, ids=lambda change: change.__name__)
def test_a_changed_model_runs_module_by_module(plain_model, model_type, change, later, steps):  # noqa: F811
    before, _ = decode(plain_model, IDS)
    model = plain_model if later else busy_model(model_type)
    steps.clear()
    change(model)
    logits, cache = decode(model, IDS)
    assert not steps
    with module_by_module():
        expected, expected_cache = decode(model, IDS)
    assert_close(logits, expected)
    assert_close(states(cache), states(expected_cache))
    # The change does something, so a step that had overlooked it would have been seen.
    assert (logits - before).abs().max() > 1e-2


def test_global_hooks_and_patched_classes(plain_model, steps, monkeypatch):  # noqa: F811
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    decode(plain_model, IDS)
    handle.remove()
    for cls in (nn.Linear, *(type(part(plain_model, name)) for name in ("", "attn", "ffn", "ffn_norm"))):
        with monkeypatch.context() as patch:
            forward = cls.forward
            patch.setattr(cls, "forward", lambda self, *args, forward=forward, **kwargs: forward(self, *args, **kwargs))
            decode(plain_model, IDS)
    assert not steps
    decode(plain_model, IDS)
    assert len(steps) == 4


def with_gradients(model):
    logits = call(model)
    assert logits.requires_grad
    return logits.detach()


def no_grad(function):
    def run(model):
        with torch.no_grad():
            return function(model)

    return run


def autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        return call(model)


def counted(model):
    with FlopCounterMode(display=False) as counter:
        logits = call(model)
    assert counter.get_total_flops() > 0
    return logits


def hidden_states(model):
    cache = DynamicCache(config=model.config)
    out = model(IDS[:, :1], past_key_values=cache, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    return out.logits


def masked_row(model):
    cache = DynamicCache(config=model.config)
    model(IDS[:, :1], past_key_values=cache)
    return model(IDS[:, 1:2], past_key_values=cache, attention_mask=torch.tensor([[1, 1], [1, 0]])).logits[:1]


CALLS = {
    "with-gradients": (with_gradients, 0),
    "train-mode": (no_grad(lambda model: call(model.train(), use_cache=True)), 0),
    "autocast": (no_grad(autocast), 0),
    "counted": (no_grad(counted), 0),
    "hidden-states": (no_grad(hidden_states), 0),
    "without-cache": (no_grad(lambda model: model(IDS[:, :1], use_cache=False).logits), 0),
    "two-tokens": (no_grad(lambda model: model(IDS[:, :2], use_cache=True).logits), 0),
    "17-rows": (no_grad(lambda model: call(model, random_ids(17, 1))), 0),
    "masked-row": (no_grad(masked_row), 1),
    "plain": (no_grad(call), 1),
    "16-rows": (no_grad(lambda model: call(model, random_ids(16, 1))), 1),
    "embeddings": (no_grad(lambda model: model(inputs_embeds=torch.ones(2, 1, 64), use_cache=True).logits), 1),
    "inference-mode": (torch.inference_mode()(call), 1),
    "mask-of-ones": (no_grad(lambda model: call(model, attention_mask=torch.ones(2, 1))), 1),
    "own-cache": (no_grad(lambda model: model(IDS[:, :1], use_cache=True).logits), 1),
}


@pytest.mark.parametrize("run, expected_steps", CALLS.values(), ids=CALLS)
def test_which_calls_take_the_step(plain_model, run, expected_steps, steps):  # noqa: F811
    logits = run(plain_model)
    assert len(steps) == expected_steps
    with module_by_module():
        expected = run(plain_model)
    assert_close(logits, expected)


def test_a_compiled_model_runs_module_by_module(steps):  # noqa: F811
    model = busy_model("rwkv6")
    with torch.no_grad():
        logits = torch.compile(model, backend="eager")(IDS[:, :1], use_cache=True).logits
        assert not steps
        assert_close(logits, call(model))
    assert len(steps) == 1


def test_a_removed_hook_brings_the_step_back(plain_model, steps):  # noqa: F811
    before, _ = decode(plain_model, IDS)
    handle = part(plain_model, "attn.o_proj").register_forward_hook(lambda module, args, output: 0 * output)
    hooked, _ = decode(plain_model, IDS)
    handle.remove()
    after, _ = decode(plain_model, IDS)
    assert len(steps) == 8
    assert torch.equal(after, before) and not torch.equal(hooked, before)
