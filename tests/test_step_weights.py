"""Changed weights are seen by the fused step, and the memory order that it gives a matrix disturbs nobody."""

import copy
import io
import pickle

import pytest
import torch
from conftest import assert_close, busy_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from step_cases import (  # noqa: F401
    IDS,
    call,
    decode,
    last_norm,
    module_by_module,
    part,
    path,
    plain_model,
    steps,
    values,
)
from torch import nn
from transformers import AutoModelForCausalLM


def another(model):
    return busy_model(model.config.model_type, seed=1)


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
    model.load_state_dict(another(model).state_dict())
    return model


def assigned(model):
    model.load_state_dict(another(model).state_dict(), assign=True)
    return model


def back_and_forth(model):
    return model.half().bfloat16().float()


def half(model):
    return model.bfloat16()


def new_module(model):
    model.base_model.get_blocks()[1] = another(model).base_model.get_blocks()[1]
    return model


def new_linear(model):
    part(model, "").set_submodule(path(model, "attn.o_proj"), part(another(model), "attn.o_proj"))
    return model


def fewer_units(model):
    ffn = part(model, "ffn")
    ffn.key.weight, ffn.value.weight = nn.Parameter(ffn.key.weight[:50]), nn.Parameter(ffn.value.weight[:, :50])
    return model


def merged(model):
    config = LoraConfig(target_modules=["key", "value", path(model, "r_proj")], init_lora_weights=False)
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
    ffn = part(model, "ffn")
    square = ffn.receptance if hasattr(ffn, "receptance") else part(model, "attn.r_proj")
    square.weight.data = square.weight.data.T
    return model


def fewer_blocks(model):
    del model.base_model.get_blocks()[-1]
    return model


UNFIT = [transposed, fewer_units, fewer_blocks]
CHANGES = [changed_in_place, new_data, loaded, assigned, back_and_forth, half, new_module, new_linear, merged, trained]


@pytest.mark.parametrize("change", [*CHANGES, *UNFIT], ids=lambda change: change.__name__)
def test_changed_weights_are_seen(plain_model, change, steps):  # noqa: F811
    before, _ = decode(plain_model, IDS)
    model = change(plain_model)
    steps.clear()
    logits, _ = decode(model, IDS)
    # A model of uneven sizes, or with a matrix in an unusual order, is for the modules.
    assert len(steps) == (0 if change in UNFIT else 4)
    with module_by_module():
        expected, _ = decode(model, IDS)
    assert_close(logits, expected, logits.dtype)
    assert (logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}], ids=str)
def test_decoding_between_training_steps_changes_nothing(model_type, options, steps):  # noqa: F811
    """Optimizers pair parameters with their state in the order of memory."""
    results = []
    for decoding in (False, True):
        model = busy_model(model_type)
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


def test_training_after_a_step_in_inference_mode(plain_model):  # noqa: F811
    with torch.inference_mode():
        call(plain_model)
    # In eval mode too, and under torch.no_grad() nothing needs the order to change back.
    with torch.no_grad():
        plain_model(IDS)
    assert not values(plain_model)[1].is_contiguous()
    plain_model(IDS, labels=IDS).loss.backward()
    assert values(plain_model)[1].is_contiguous()
    torch.optim.SGD(plain_model.parameters(), lr=0.1).step()
    plain_model.zero_grad()
    decode(plain_model, IDS)
    assert not values(plain_model)[1].is_contiguous()
    plain_model.train()
    assert values(plain_model)[1].is_contiguous()


def test_parameters_stay_the_same_objects(plain_model):  # noqa: F811
    before = dict(plain_model.named_parameters())
    addresses = {name: p.data_ptr() for name, p in before.items()}
    copies = {name: p.detach().clone() for name, p in before.items()}
    decode(plain_model, IDS)
    for name, p in plain_model.named_parameters():
        assert p is before[name] and torch.equal(p, copies[name])
        # Nothing is copied but the matrices whose order changes; these may take over the memory of one another.
        moved = name.endswith(path(plain_model, "ffn.value.weight"))
        assert p.is_contiguous() != moved and (p.data_ptr() == addresses[name] or moved)


def test_saved_as_before(plain_model, tmp_path):  # noqa: F811
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


def test_what_state_dict_holds_are_the_weights(plain_model):  # noqa: F811
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
        last_norm(plain_model).weight.zero_()
    for other in others:
        assert torch.equal(decode(other, IDS)[0], logits)
    assert len(steps) == 16
