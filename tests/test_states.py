"""States in files: bit-exact there and back, refused where they do not fit, shared without harm."""

import copy
import json
import os

import pytest
import torch
from conftest import assert_close, busy_model, random_ids, states
from oracle.official import Official, random_official
from oracle.ours import our_model, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.cache_utils import DynamicCache

from wkv.states import continue_from, expand_state, load_state, read_text, save_state

PROMPT, NEW = random_ids(1, 9), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def saved(model, tmp_path):
    """A state in the middle of a text, and its file."""
    cache = read_text(model, PROMPT)
    save_state(cache, tmp_path / "a.state", model)
    return cache, tmp_path / "a.state"


def assert_equal_states(actual, expected) -> None:
    assert all(map(torch.equal, states(actual), states(expected)))
    assert [t.dtype for t in states(actual)] == [t.dtype for t in states(expected)]
    assert int(actual.get_seq_length()) == int(expected.get_seq_length())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saving_in_the_middle_changes_no_bit(own_model, dtype, tmp_path):
    model, text = own_model.to(dtype), random_ids(3, 21)
    cache = read_text(model, text[:, :13])
    save_state(cache, tmp_path / "s", model)
    loaded = load_state(tmp_path / "s", model)
    assert_equal_states(loaded, cache)
    rest = {"attention_mask": torch.ones(3, 21, dtype=torch.long), "use_cache": True}
    with torch.no_grad():
        expected = model(text[:, 13:], past_key_values=cache, **rest)
        actual = model(text[:, 13:], past_key_values=loaded, **rest)
    assert torch.equal(actual.logits, expected.logits)
    assert_equal_states(actual.past_key_values, expected.past_key_values)


def test_the_file_explains_itself(model, saved):
    _, path = saved
    with safe_open(path, framework="pt") as file:
        header, shapes = file.metadata(), {name: tuple(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
    config = model.config
    assert header["format"] == "wkv state" and header["version"] == "1" and header["model_type"] == config.model_type
    assert header["orientation"] == "[H, K, V]" or config.model_type == "rwkv"
    assert (header["tokens"], header["rows"], header["dtype"]) == ("9", "1", "float32")
    assert json.loads(header["state_shape"]) == list(config.state_shape)
    names = [f"layers.{layer}.{name}" for layer in range(3) for name in ("att_shift", "ffn_shift", "wkv")]
    assert sorted(shapes) == names
    assert shapes["layers.2.wkv"] == (1, *config.state_shape) and shapes["layers.0.ffn_shift"] == (1, 64)


def test_a_model_in_another_dtype_takes_the_state(own_model, saved):
    cache, path = saved
    loaded = load_state(path, own_model.bfloat16())
    for actual, expected in zip(states(loaded), states(cache), strict=True):
        is_shift = expected.shape[-1] == 1 and expected.ndim == 3
        assert torch.equal(actual, expected.bfloat16() if is_shift else expected)
    own_model.generate(**continue_from(loaded, PROMPT), **NEW)


def test_forks_equal_the_text_read_whole_and_do_not_touch_each_other(model, saved):
    cache, path = saved
    before = copy.deepcopy(cache)
    questions = random_ids(3, 4, seed=1)
    whole = model.generate(torch.cat([PROMPT.expand(3, -1), questions], 1), **NEW)[:, 9:]
    assert torch.equal(model.generate(**continue_from(cache, questions), **NEW), whole)
    for source in (cache, load_state(path, model)):
        for row in (2, 0, 1):
            alone = model.generate(**continue_from(source, questions[row : row + 1]), **NEW)
            assert torch.equal(alone, whole[row : row + 1])
        assert_equal_states(source, before)
    assert_equal_states(load_state(path, model), before)
    extended = read_text(model, questions[:1], cache)
    assert int(extended.get_seq_length()) == 13 and not torch.equal(states(extended)[2], states(cache)[2])
    assert_equal_states(cache, before)


def test_padded_questions_on_a_shared_state(model, saved):
    cache, _ = saved
    questions, mask = random_ids(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    out = model.generate(**continue_from(cache, questions * mask, mask), **NEW)
    alone = model.generate(torch.cat([PROMPT, questions[:1, 2:]], 1), **NEW)
    assert torch.equal(out[0, 5:], alone[0, 12:])


def test_rows_of_a_state(model):
    cache = read_text(model, random_ids(2, 5))
    copied = expand_state(cache, 2)
    for actual, expected in zip(states(copied), states(cache), strict=True):
        assert torch.equal(actual, expected[[0, 0, 1, 1]])
        actual.zero_()
        assert expected.any()
    with pytest.raises(ValueError, match="has 2 rows, 3 are"):
        continue_from(cache, random_ids(3, 1))


DAMAGES = {
    "cut": lambda data: data[:-7],
    "cut in the header": lambda data: data[:100],
    "a bit of a state": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "the number of tokens": lambda data: data.replace(b'"tokens":"9"', b'"tokens":"8"'),
    "empty": lambda data: b"",
    "text": lambda data: b"not a state, but long enough to be one",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused(damage, model, saved):
    _, path = saved
    data = path.read_bytes()
    path.write_bytes(DAMAGES[damage](data))
    assert path.read_bytes() != data
    with pytest.raises(ValueError) as error:
        load_state(path, model)
    assert str(path) in str(error.value) and ("damaged" in str(error.value) or "truncated" in str(error.value))


def test_states_of_other_models_are_refused(model_type, model, saved):
    _, path = saved
    for field, changes in {
        "num_hidden_layers": {"num_hidden_layers": 2},
        "hidden_size": {"hidden_size": 32, "attention_hidden_size": model.config.attention_hidden_size},
        "intermediate_size": {"intermediate_size": 128},
    }.items():
        other = busy_model(model_type, **changes)
        with pytest.raises(ValueError, match=f"`{field}` is .* in the file, .* in the model") as error:
            load_state(path, other)
        assert str(path) in str(error.value)
    other = busy_model("rwkv6" if model_type == "rwkv7" else "rwkv7")
    with pytest.raises(ValueError, match=f"`model_type` is {model_type} in the file, {other.config.model_type} in the"):
        load_state(path, other)


def test_what_is_no_state_is_refused(model_type, model, saved, tmp_path):
    cache, path = saved
    weights = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(2)}, weights)
    tensors = load_file(path)
    save_file(tensors, tmp_path / "later", {"format": "wkv state", "version": "2"})
    for name, words in {
        "weights.safetensors": "not a state file",
        "later": "version 2",
        "none": "cannot be read",
    }.items():
        with pytest.raises(ValueError, match=words):
            load_state(tmp_path / name, model)
    other = busy_model(model_type, num_hidden_layers=2)
    for wrong, owner in ((DynamicCache(config=model.config), model), (None, model), (cache, other)):
        with pytest.raises(ValueError, match=r"new\.state"):
            save_state(wrong, tmp_path / "new.state", owner)
    assert not (tmp_path / "new.state").exists()


def test_a_file_appears_whole_or_not_at_all(model, saved, monkeypatch):
    cache, path = saved
    old = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_state(read_text(model, PROMPT, cache), path, model)
    assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]
    monkeypatch.undo()
    save_state(read_text(model, PROMPT, cache), path, model)
    assert int(load_state(path, model).get_seq_length()) == 18
    for wrong, words in ((path.parent, "is a folder"), (path.parent / "no" / "s", "no such folder")):
        with pytest.raises(FileNotFoundError, match=words):
            save_state(cache, wrong, model)


TUNED = ["5.2", "6", "7"]


def tuned(weights, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"blocks.{layer}.att.time_state": torch.randn(4, 8, 8, generator=generator) for layer in range(3)}


@pytest.mark.parametrize("version", TUNED)
def test_official_tuned_states(version, tmp_path):
    """The package takes them from a checkpoint; its RWKV-7 holds the state in their orientation."""
    weights, ids = random_official(version), random_ids(12, vocab_size=37).tolist()
    time_state = tuned(weights)
    torch.save({name: tensor.bfloat16() for name, tensor in time_state.items()}, tmp_path / "tuned.pth")
    time_state = {name: tensor.bfloat16().float() for name, tensor in time_state.items()}
    save_file(time_state, tmp_path / "tuned.safetensors")
    if version == "7":
        package = Official(weights)
        state = package.zero_state()
        state[1::3] = time_state.values()
        expected, _ = package.model.forward(ids, state, full_output=True)
    else:
        expected, _ = Official(weights | time_state).model.forward(ids, None, full_output=True)
    model = our_model(weights)
    (tmp_path / "tuned.pth").rename(tmp_path / "tuned")
    for name in ("tuned", "tuned.safetensors"):
        cache = load_state(tmp_path / name, model)
        assert int(cache.get_seq_length()) == 0
        logits, _ = run(model, ids, [7, 1, 4], cache)
        assert_close(logits, expected)
    assert (logits - run(model, ids, [12])[0]).abs().max() > 0.1


def test_tuned_states_that_do_not_fit_are_refused(tmp_path):
    weights, path = random_official("7"), tmp_path / "tuned.pth"
    model = our_model(weights)
    first, last = "blocks.0.att.time_state", "blocks.2.att.time_state"
    good = tuned(weights)
    for change, words in {
        "missing": (good.keys() - {last}, f"{last} is missing; the model has 3 layers"),
        "more": ({"blocks.3.att.time_state": good[first]}, "blocks.3.att.time_state is not expected"),
        "shape": ({first: torch.zeros(4, 8, 9)}, rf"{first} is torch.float32 \(4, 8, 9\), the model needs"),
        "integers": ({first: torch.zeros(4, 8, 8, dtype=torch.long)}, f"{first} is torch.int64"),
    }.values():
        torch.save({n: good[n] for n in sorted(change)} if isinstance(change, set) else good | change, path)
        with pytest.raises(ValueError, match=words) as error:
            load_state(path, model)
        assert str(path) in str(error.value)
    torch.save(good, path)
    with pytest.raises(ValueError, match="a model of type rwkv cannot begin with"):
        load_state(path, busy_model("rwkv"))
