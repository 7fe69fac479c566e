"""When models take the fused step: only where nothing else is wanted, and never with anything outdated.

Letters: B rows.
"""

import copy
import io
import pickle

import pytest
import torch
from conftest import assert_close, busy_model, random_ids, states
from peft import LoraConfig, get_peft_model
from rwkv7_step_cases import decode, module_by_module, steps  # noqa: F401
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.cache_utils import DynamicCache, StaticCache

IDS = random_ids(2, 4)


@pytest.fixture
def plain_model():
    return busy_model("rwkv7")


def block(model):
    return model.model.layers[1]


def hook(model):
    block(model).attn.w_lora.lora[1].register_forward_hook(lambda module, args, output: 0.5 * output)


def pre_hook(model):
    block(model).ffn.value.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))


def norm_hook(model):
    model.model.norm.register_forward_hook(lambda module, args, output: 0.5 * output)


def own_forward(model):
    linear = block(model).attn.k_proj
    linear.forward = lambda x: 0.5 * nn.functional.linear(x, linear.weight)


class Halved(nn.Linear):
    def forward(self, x):
        return 0.5 * super().forward(x)


def subclass(model):
    old = block(model).ffn.key
    block(model).ffn.key = Halved(old.in_features, old.out_features, bias=False)
    block(model).ffn.key.weight = old.weight


def other_class(model):
    block(model).attn.r_proj.__class__ = Halved


def activation(model):
    block(model).attn.g_lora.lora[1] = nn.Tanh()


def bias(model):
    block(model).attn.o_proj.bias = nn.Parameter(torch.linspace(-1, 1, 64))


def no_affine(model):
    model.model.norm = nn.LayerNorm(64, elementwise_affine=False)


def parametrization(model):
    nn.utils.parametrizations.weight_norm(block(model).attn.v_proj)
    block(model).attn.v_proj.parametrizations.weight.original0.data.mul_(0.5)


def lora(model):
    peft = get_peft_model(model, LoraConfig(target_modules=["key", "r_proj"], init_lora_weights=False)).eval()
    assert any(p.requires_grad for p in peft.parameters())


def eps(model):
    block(model).ffn_norm.eps = 0.5


def group_eps(model):
    block(model).attn.g_norm.eps = 0.5


UNFIT = [hook, pre_hook, norm_hook, own_forward, subclass, other_class, activation, bias, no_affine, parametrization]
UNFIT += [lora, eps, group_eps]


@pytest.mark.parametrize("later", [False, True], ids=["from-the-start", "after-steps"])
@pytest.mark.parametrize("change", UNFIT, ids=lambda change: change.__name__)
def test_a_changed_model_runs_module_by_module(plain_model, change, later, steps):  # noqa: F811
    before, _ = decode(plain_model, IDS)
    model = plain_model if later else busy_model("rwkv7")
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
    for cls in (nn.Linear, type(block(plain_model)), type(block(plain_model).attn)):
        with monkeypatch.context() as patch:
            forward = cls.forward
            patch.setattr(cls, "forward", lambda self, *args, forward=forward, **kwargs: forward(self, *args, **kwargs))
            decode(plain_model, IDS)
    assert not steps
    decode(plain_model, IDS)
    assert len(steps) == 4


def call(model, ids=IDS, **options):
    cache = DynamicCache(config=model.config)
    return model(ids[:, :1], past_key_values=cache, **options).logits


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


def compiled(model):
    return torch.compile(model, backend="eager")(IDS[:, :1], use_cache=True).logits


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
    "compiled": (no_grad(compiled), 0),
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


def changed_in_place(model):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    return model


def new_data(model):
    for p in model.parameters():
        p.data = 1.05 * p.data
    return model


def loaded(model):
    model.load_state_dict(busy_model("rwkv7", seed=1).state_dict())
    return model


def assigned(model):
    model.load_state_dict(busy_model("rwkv7", seed=1).state_dict(), assign=True)
    return model


def back_and_forth(model):
    return model.half().bfloat16().float()


def half(model):
    return model.bfloat16()


def new_module(model):
    model.model.layers[1] = busy_model("rwkv7", seed=1).model.layers[1]
    return model


def new_linear(model):
    block(model).attn.o_proj = busy_model("rwkv7", seed=1).model.layers[1].attn.o_proj
    return model


def fewer_units(model):
    ffn = block(model).ffn
    ffn.key.weight, ffn.value.weight = nn.Parameter(ffn.key.weight[:50]), nn.Parameter(ffn.value.weight[:, :50])
    return model


def merged(model):
    config = LoraConfig(target_modules=["key", "value", "r_proj"], init_lora_weights=False)
    return get_peft_model(model, config).merge_and_unload().eval()


def trained(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    model.train()
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def transposed(model):
    projection = block(model).attn.r_proj.weight
    projection.data = projection.data.T
    return model


CHANGES = [changed_in_place, new_data, loaded, assigned, back_and_forth, half, new_module, new_linear, merged, trained]


@pytest.mark.parametrize("change", [*CHANGES, transposed, fewer_units], ids=lambda change: change.__name__)
def test_changed_weights_are_seen(plain_model, change, steps):  # noqa: F811
    before, _ = decode(plain_model, IDS)
    model = change(plain_model)
    steps.clear()
    logits, _ = decode(model, IDS)
    # A model of uneven sizes, or with a matrix in an unusual order, is for the modules.
    assert len(steps) == (0 if change in (transposed, fewer_units) else 4)
    with module_by_module():
        expected, _ = decode(model, IDS)
    assert_close(logits, expected, logits.dtype)
    assert (logits - before).abs().max() > 1e-3


def test_a_removed_hook_brings_the_step_back(plain_model, steps):  # noqa: F811
    before, _ = decode(plain_model, IDS)
    handle = block(plain_model).attn.register_forward_hook(lambda module, args, output: (0 * output[0], output[1]))
    hooked, _ = decode(plain_model, IDS)
    handle.remove()
    after, _ = decode(plain_model, IDS)
    assert len(steps) == 8
    assert torch.equal(after, before) and not torch.equal(hooked, before)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}], ids=str)
def test_decoding_between_training_steps_changes_nothing(options, steps):  # noqa: F811
    """Optimizers pair parameters with their state in the order of memory."""
    results = []
    for decoding in (False, True):
        model = busy_model("rwkv7")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
        for _ in range(3):
            if decoding:
                decode(model.eval(), IDS[:, :1])
            model.train()
            model(IDS, labels=IDS).loss.backward()
            if decoding:
                decode(model.eval(), IDS[:, :1])
            optimizer.step()
            if decoding:
                decode(model, IDS[:, :1])
            optimizer.zero_grad()
            if decoding:
                decode(model, IDS[:, :1])
        results.append(model.state_dict())
    assert len(steps) == 12
    assert all(torch.equal(x, results[1][name]) for name, x in results[0].items())


def test_training_after_a_step_in_inference_mode(plain_model):
    with torch.inference_mode():
        call(plain_model)
    # In eval mode too, and under torch.no_grad() nothing needs the order to change back.
    with torch.no_grad():
        plain_model(IDS)
    assert not block(plain_model).ffn.value.weight.is_contiguous()
    plain_model(IDS, labels=IDS).loss.backward()
    assert block(plain_model).ffn.value.weight.is_contiguous()
    torch.optim.SGD(plain_model.parameters(), lr=0.1).step()


def test_parameters_stay_the_same_objects(plain_model):
    before = dict(plain_model.named_parameters())
    addresses = {name: p.data_ptr() for name, p in before.items()}
    values = {name: p.detach().clone() for name, p in before.items()}
    decode(plain_model, IDS)
    for name, p in plain_model.named_parameters():
        assert p is before[name] and torch.equal(p, values[name])
        # Nothing is copied but the matrices whose order changes; these may take over the memory of one another.
        assert p.is_contiguous() == ("ffn.value" not in name)
        assert p.data_ptr() == addresses[name] or "ffn.value" in name


def test_saved_as_before(plain_model, tmp_path):
    plain_model.save_pretrained(tmp_path / "before")
    expected = {name: x.clone() for name, x in plain_model.state_dict().items()}
    logits, _ = decode(plain_model, IDS)

    assert all(x.is_contiguous() for x in plain_model.state_dict().values())
    decode(plain_model, IDS)
    save_file(plain_model.state_dict(), tmp_path / "plain.safetensors")
    decode(plain_model, IDS)
    plain_model.save_pretrained(tmp_path / "after")
    before, after = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("before", "after"))
    assert before == after
    assert all(torch.equal(x, expected[name]) for name, x in load_file(tmp_path / "plain.safetensors").items())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    assert torch.equal(decode(reloaded, IDS)[0], logits)


def test_what_state_dict_holds_are_the_weights(plain_model):
    """Averages of weights, for one, are written through it."""
    decode(plain_model, IDS)
    for x in plain_model.state_dict().values():
        x.zero_()
    assert not any(p.any() for p in plain_model.parameters())


def test_copies_and_pickles(plain_model, steps):  # noqa: F811
    logits, _ = decode(plain_model, IDS)
    memory = io.BytesIO()
    torch.save(plain_model, memory)
    memory.seek(0)
    others = [
        copy.deepcopy(plain_model),
        pickle.loads(pickle.dumps(plain_model)),
        torch.load(memory, weights_only=False),
    ]
    with torch.no_grad():
        plain_model.model.norm.weight.zero_()
    for other in others:
        assert torch.equal(decode(other, IDS)[0], logits)
    assert len(steps) == 16


@pytest.fixture
def generator(plain_model):
    plain_model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0, do_sample=False)
    return plain_model


GENERATE = {
    "greedy": {"max_new_tokens": 220},
    "beams": {"max_new_tokens": 30, "num_beams": 4, "num_return_sequences": 2},
    "static-cache": {"max_new_tokens": 30, "cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
def test_generate(generator, options, steps):  # noqa: F811
    prompt = random_ids(3, 5)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    out = generator.generate(prompt, attention_mask=mask, **options)
    assert len(steps) >= options["max_new_tokens"] - 1
    with module_by_module():
        assert torch.equal(out, generator.generate(prompt, attention_mask=mask, **options))


def test_caches_are_shared_with_the_modules(plain_model, steps):  # noqa: F811
    """Whichever way a token goes, reordering, growing and resetting the batch in between."""
    ids, results = random_ids(4, 9), []
    for fused in (True, False):
        for kind in (DynamicCache, StaticCache):
            cache = kind(config=plain_model.config, **({} if kind is DynamicCache else {"max_cache_len": 20}))
            logits = []
            for t in range(9):
                rows = ids if t >= 5 else ids[:2]
                if t == 5:
                    cache.batch_repeat_interleave(2)
                if t == 7:
                    cache.reorder_cache(torch.tensor([3, 0, 0, 2]))
                if t == 8:
                    cache.reset()
                if fused and t % 3:
                    logits.append(decode(plain_model, rows[:, t : t + 1], cache)[0])
                else:
                    with module_by_module():
                        logits.append(decode(plain_model, rows[:, t : t + 1], cache)[0])
            results.append(logits)
    assert len(steps) == 12
    for other in results[1:]:
        assert_close(other, results[0])


def test_a_cache_that_does_not_fit_is_refused_unchanged(plain_model):
    _, cache = decode(plain_model, IDS)
    before = [x.clone() for x in states(cache)]
    with torch.no_grad(), pytest.raises(ValueError, match="another model or"):
        plain_model(random_ids(3, 1), past_key_values=cache)
    assert all(torch.equal(x, y) for x, y in zip(states(cache), before, strict=True))
