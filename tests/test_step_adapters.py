"""Adapters and the fused step: it computes LoRA itself, notices every change, and leaves other kinds to the modules.

Letters: B rows, T tokens, S the WKV state.
"""

from functools import partial

import pytest
import torch
from conftest import assert_close, busy_model, random_ids, states, time_mix
from peft import IA3Config, LoraConfig, get_peft_model
from step_cases import (  # noqa: F401
    IDS,
    decode,
    decode_exactly,
    heads,
    module_by_module,
    part,
    path,
    plain_model,
    steps,
)
from torch import nn
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from wkv.models import rwkv_linear, rwkv_step

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def config(**options) -> LoraConfig:
    """Adapters of PEFT's default targets, none of which begins as zero."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options})


def loras(model) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "lora_A")]


def check(model, steps, expected_steps: int = 4):  # noqa: F811
    """Decoding agrees with the modules and takes the step that often; returns the logits."""
    steps.clear()
    logits, cache = decode(model, IDS)
    assert len(steps) == expected_steps
    with module_by_module():
        expected, expected_cache = decode(model, IDS)
    assert_close(logits, expected, logits.dtype)
    assert_close(states(cache), states(expected_cache), logits.dtype)
    return logits


@pytest.mark.parametrize("autocast_adapter", [True, False], ids=["float32-adapter", "same-dtype"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_parity(model_type, dtype, autocast_adapter, steps):  # noqa: F811
    """Every matrix with two adapters of uneven ranks, the second one in one layer only."""
    sizes = {**heads(model_type, 3, 20), "hidden_size": 37, "num_hidden_layers": 2}
    model, ids = busy_model(model_type, **sizes).to(dtype), random_ids(3, 4)
    own_dtype = {"autocast_adapter_dtype": autocast_adapter}
    peft = get_peft_model(model, config(r=17, target_modules="all-linear"), **own_dtype)
    peft.add_adapter("second", config(r=3, layers_to_transform=[1], use_rslora=True), **own_dtype)
    peft.base_model.set_adapter(["default", "second"])
    peft.eval()
    assert {m.weight.dtype for m in loras(model)[0].lora_A.values()} == {torch.float32 if autocast_adapter else dtype}
    expected, expected_cache = decode_exactly(model, ids)
    logits, cache = decode(model, ids)
    assert len(steps) == 4
    assert_close(logits, expected, dtype)
    assert_close(states(cache), states(expected_cache), dtype)
    with peft.disable_adapter():
        assert (decode(model, ids)[0] - logits).abs().max() > 1e-2


def test_threads_do_not_change_a_bit(model_type, steps):  # noqa: F811
    sizes = {**heads(model_type, 5, 36), "hidden_size": 300, "intermediate_size": 750, "num_hidden_layers": 2}
    model, results = busy_model(model_type, **sizes), []
    get_peft_model(model, config(r=33, target_modules="all-linear")).eval()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        logits, cache = decode(model, IDS)
        results.append([logits, *states(cache)])
    assert len(steps) == 12
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(other, results[0], strict=True))


def test_nothing_is_examined_twice(plain_model, monkeypatch):  # noqa: F811
    examined, real = [], rwkv_step.FusedStep.examine
    monkeypatch.setattr(rwkv_step.FusedStep, "examine", lambda *args: examined.append(args) or real(*args))
    peft = get_peft_model(plain_model, config(lora_dropout=0.1)).eval()
    for expected in (1, 2):
        decode(plain_model, IDS)
        with peft.disable_adapter():
            decode(plain_model, IDS)
            decode(plain_model, IDS)
        assert len(examined) == 2 * expected


def switched(peft):
    peft.set_adapter("other")


def both_active(peft):
    peft.base_model.set_adapter(["default", "other"])


def disabled(peft):
    peft.base_model.disable_adapter_layers()


def merged(peft):
    peft.merge_adapter()


def unloaded(peft):
    peft.unload()


def rescaled(peft):
    for lora in loras(peft):
        lora.set_scale("default", 0.5)


def deleted(peft):
    peft.set_adapter("other")
    peft.delete_adapter("default")


def replaced(peft):
    peft.delete_adapter("default")
    peft.add_adapter("default", config(r=3))
    peft.set_adapter("default")
    peft.eval()


def weights_changed(peft):
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.mul_(-1)


def weights_assigned(peft):
    for lora in loras(peft):
        lora.lora_A["default"].weight = nn.Parameter(-lora.lora_A["default"].weight)


def trained(peft):
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=0.1)
    peft.train()
    peft(IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    peft.eval()


CHANGES = [switched, both_active, disabled, merged, unloaded, rescaled, deleted, replaced, weights_changed]
CHANGES += [weights_assigned, trained]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_adapters_are_seen(plain_model, change, steps):  # noqa: F811
    peft = get_peft_model(plain_model, config())
    peft.add_adapter("other", config(r=5, target_modules=["key", "value", path(plain_model, "r_proj")]))
    before = check(plain_model.eval(), steps)
    change(peft)
    after = check(plain_model, steps)
    # Merging only moves the terms into the weights.
    assert (after - before).abs().max() > 1e-3 or change is merged


def test_disabled_adapters_in_turns(plain_model, steps):  # noqa: F811
    plain = check(plain_model, steps)
    peft = get_peft_model(plain_model, config()).eval()
    adapted = check(plain_model, steps)
    with peft.disable_adapter():
        assert torch.equal(check(plain_model, steps), plain)
    assert torch.equal(check(plain_model, steps), adapted)
    # A disabled layer unmerges its adapters when it is called, so the first token is for the modules.
    peft.merge_adapter()
    with peft.disable_adapter():
        assert_close(check(plain_model, steps, 3), plain)
    assert_close(check(plain_model, steps), adapted)


def dora(peft):
    peft.add_adapter("unfit", config(use_dora=True))
    peft.set_adapter("unfit")


def lora_bias(peft):
    peft.add_adapter("unfit", config(lora_bias=True))
    for lora in loras(peft):
        nn.init.constant_(lora.lora_B["unfit"].bias, 0.1)
    peft.set_adapter("unfit")


def hook(peft):
    loras(peft)[0].lora_A["default"].register_forward_hook(lambda module, args, output: 0.5 * output)


def hook_on_a_layer(peft):
    loras(peft)[0].register_forward_hook(lambda module, args, output: 0.5 * output)


def own_forward(peft):
    lora = loras(peft)[-1]
    lora.forward = lambda x: 0.5 * lora.base_layer(x)


def other_class(peft):
    class Halved(type(loras(peft)[0])):
        def forward(self, *args):
            return 0.5 * super().forward(*args)

    loras(peft)[-1].__class__ = Halved


def scale_by_channel(peft):
    for lora in loras(peft):
        lora.scaling["default"] = torch.full((lora.out_features,), 3.0)


def transposed(peft):
    linear = loras(peft)[0].lora_A["default"]
    linear.weight.data = -linear.weight.data.T.contiguous().T


def other_method(peft):
    targets = {"target_modules": ["key", "value"], "feedforward_modules": ["value"], "init_ia3_weights": False}
    get_peft_model(peft.unload(), IA3Config(**targets))


def saved_module(peft):
    model = peft.unload()
    get_peft_model(model, LoraConfig(r=4, modules_to_save=[path(model, "ffn_norm")]))
    part(model, "ffn_norm").modules_to_save["default"].weight.data.mul_(0.5)


UNFIT = [dora, lora_bias, hook, hook_on_a_layer, own_forward, other_class, scale_by_channel, transposed]
UNFIT += [other_method, saved_module]


@pytest.mark.parametrize("change", UNFIT, ids=lambda change: change.__name__)
def test_other_adapters_run_module_by_module(plain_model, change, steps):  # noqa: F811
    peft = get_peft_model(plain_model, config()).eval()
    before = check(plain_model, steps)
    change(peft)
    assert (check(plain_model.eval(), steps, 0) - before).abs().max() > 1e-3


def test_dropout_and_patched_classes(plain_model, steps, monkeypatch):  # noqa: F811
    peft = get_peft_model(plain_model, config(lora_dropout=0.5)).eval()
    check(plain_model, steps)
    cls, forward = type(loras(peft)[0]), type(loras(peft)[0]).forward
    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", lambda self, *args: forward(self, *args))
        check(plain_model, steps, 0)
    check(plain_model, steps)
    # As accelerate's hooks do it.
    lora = loras(peft)[0]
    lora.forward = partial(forward, lora)
    check(plain_model, steps, 0)
    del lora.forward
    check(plain_model, steps)
    # PEFT leaves the dropout of a new adapter in train mode.
    dropout = loras(peft)[0].lora_dropout["default"].train()
    steps.clear()
    decode(plain_model, IDS)
    assert not steps
    dropout.eval()
    check(plain_model, steps)


def generate(model, **options):
    """Greedy text after two prompts."""
    return model.generate(input_ids=random_ids(2, 5), max_new_tokens=30, **options)


def test_generate_under_peft(plain_model, steps):  # noqa: F811
    plain_model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, do_sample=False)
    peft = get_peft_model(plain_model, config(task_type="CAUSAL_LM"))
    peft.add_adapter("other", config(task_type="CAUSAL_LM"))
    peft.eval()
    texts = {}
    for adapter in ("default", "other"):
        peft.set_adapter(adapter)
        steps.clear()
        texts[adapter] = generate(peft)
        assert len(steps) == 29
        with module_by_module():
            assert torch.equal(generate(peft), texts[adapter])
    assert not torch.equal(texts["default"], texts["other"])

    # An adapter for each row.
    steps.clear()
    mixed = generate(peft, adapter_names=["default", "other"])
    assert not steps
    assert torch.equal(mixed[0], texts["default"][0]) and torch.equal(mixed[1], texts["other"][1])
    assert torch.equal(generate(peft), texts["other"]) and len(steps) == 29


def some_state(shape) -> torch.Tensor:
    """Uneven, for a norm takes away what all channels have in common; positive, for RWKV-4 keeps a sum of weights."""
    return torch.linspace(0.1, 1, torch.Size(shape).numel()).view(shape)


class OwnState(nn.Module):
    """A WKV state for every text to begin with."""

    def __init__(self, shape):
        super().__init__()
        self.S = nn.Parameter(some_state(shape))

    def forward(self):
        return self.S


@pytest.mark.parametrize("later", [False, True], ids=["from-the-start", "after-steps"])
def test_a_state_of_the_models_own(plain_model, later, steps):  # noqa: F811
    """The modules begin a text with it, and the step goes on."""
    with module_by_module():
        plain, _ = decode(plain_model, IDS)
    if later:
        decode(plain_model, IDS)
    zeros = time_mix(plain_model, 1).initial_state
    time_mix(plain_model, 1).initial_state = OwnState(plain_model.config.state_shape)
    own = check(plain_model, steps, 3)
    assert (own - plain).abs().max() > 1e-2

    cache = DynamicCache(config=plain_model.config)
    decode(plain_model, IDS, cache)
    cache.reset()
    assert_close(decode(plain_model, IDS, cache)[0], own)
    time_mix(plain_model, 1).initial_state = zeros
    assert_close(check(plain_model, steps), plain)


def test_a_hook_on_an_initial_state(plain_model, steps):  # noqa: F811
    S = some_state(plain_model.config.state_shape)
    handle = time_mix(plain_model, 1).initial_state.register_forward_hook(lambda module, args, output: S)
    hooked = check(plain_model, steps, 3)
    handle.remove()
    assert (check(plain_model, steps) - hooked).abs().max() > 1e-2


def test_lora_on_the_head(plain_model, steps, monkeypatch):  # noqa: F811
    """It is outside of the step, and read once too; so is every product of a short prompt before RWKV-7."""
    calls, real = [], rwkv_linear.few_rows_linear
    monkeypatch.setattr(rwkv_linear, "few_rows_linear", lambda x, weight: calls.append(weight) or real(x, weight))
    name, head = "lm_head" if hasattr(plain_model, "lm_head") else "head", plain_model.get_output_embeddings()
    before = check(plain_model, steps)
    peft = get_peft_model(plain_model, config(target_modules=[name, "key"])).eval()
    calls.clear()
    after = check(plain_model, steps)
    assert [id(weight) for weight in calls] == 4 * [id(head.weight)]
    assert (after - before).abs().max() > 1e-2
    with torch.no_grad():
        prompt = plain_model(IDS).logits
        with module_by_module():
            assert_close(prompt, plain_model(IDS).logits)
    lora = plain_model.get_output_embeddings()
    handle = lora.register_forward_hook(lambda module, args, output: 0 * output)
    assert not check(plain_model, steps).any()
    handle.remove()
    with peft.disable_adapter():
        assert (check(plain_model, steps) - after).abs().max() > 1e-2
