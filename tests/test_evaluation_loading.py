"""What lm-eval's model `wkv` takes and refuses: folders, objects, adapters, GGUF files, tokenizers, chat templates."""

import copy

import evaluation_cases as cases
import peft
import pytest
import torch
from evaluation_cases import PAIRS, PROMPTS, ask, assert_same_scores, hf, ours
from peft_cases import adapted, train
from test_state_tuning import tune
from transformers import LlamaConfig, LlamaForCausalLM, RwkvConfig
from transformers.models.rwkv.modeling_rwkv import RwkvForCausalLM

import wkv
from wkv.checkpoints import convert
from wkv.evaluation import WkvLM

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def base():
    return cases.model("rwkv7")


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    base.save_pretrained(path)
    cases.tokenizer().save_pretrained(path)
    return path


def prompt_tuned(model):
    tuned = peft.get_peft_model(
        model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_attention_heads=1)
    )
    train(tuned, torch.tensor([[3, 5, 7, 9]]))
    return tuned.eval()


ADAPTERS = {"lora": adapted, "state": tune, "prompt": prompt_tuned}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(kind, base, folder, tmp_path):
    """On a folder by `peft`, the adapter's own folder, and as an object."""
    model = ADAPTERS[kind](copy.deepcopy(base))
    expected = ask(hf(model), "loglikelihood", PAIRS)
    texts = ask(hf(model), "generate_until", PROMPTS[:4])
    without = ask(ours(base), "loglikelihood", PAIRS)
    assert max(abs(a[0] - b[0]) for a, b in zip(expected, without, strict=True)) > 0.01
    model.save_pretrained(tmp_path / "adapter")
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "own")
    for lm in (
        ours(model),
        WkvLM(str(folder), peft=str(tmp_path / "adapter"), device="cpu"),
        WkvLM(str(tmp_path / "own"), device="cpu"),
    ):
        assert_same_scores(ask(lm, "loglikelihood", PAIRS), expected)
        assert ask(lm, "generate_until", PROMPTS[:4]) == texts


def test_folders_dtypes_and_gguf_files(base, folder, tmp_path):
    expected = ask(ours(base), "loglikelihood", PAIRS)
    lm = WkvLM(str(folder), device="cpu")
    assert ask(lm, "loglikelihood", PAIRS) == expected
    assert lm.model.dtype == torch.float32 and lm.tokenizer_name
    half = WkvLM(str(folder), device="cpu", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half.create_from_arg_string(f"pretrained={folder},dtype=float16,leading_token=True").leading_token
    convert(folder, tmp_path / "m.gguf", "gguf", tokenizer=False)
    lm = WkvLM(str(tmp_path), gguf_file="m.gguf", tokenizer=str(folder), device="cpu")
    # Wide matrices are bfloat16 in the file, or float16.
    assert max(abs(a[0] - b[0]) for a, b in zip(ask(lm, "loglikelihood", PAIRS), expected, strict=True)) < 0.5


def test_the_models_own_folder_has_the_tokenizer(folder):
    from transformers import AutoModelForCausalLM

    lm = WkvLM(AutoModelForCausalLM.from_pretrained(folder))
    assert lm.tok_encode(" the union") == cases.tokenizer().encode(" the union")


def test_refusals(base, folder, tmp_path):
    llama = LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=300)
    )
    llama.save_pretrained(tmp_path / "llama")
    base.save_pretrained(tmp_path / "bare")
    native = RwkvForCausalLM(RwkvConfig(hidden_size=16, num_hidden_layers=2, vocab_size=300))
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_attention_heads=1)
    for words, arguments in {
        ("llama", "not RWKV", "--model hf"): {"pretrained": str(tmp_path / "llama")},
        ("type llama", "not RWKV"): {"pretrained": llama, "tokenizer": cases.tokenizer()},
        ("transformers", "not one of wkv's"): {"pretrained": native, "tokenizer": cases.tokenizer()},
        ("bare", "no tokenizer", "`tokenizer`"): {"pretrained": str(tmp_path / "bare")},
        ("no folder", "`tokenizer`"): {"pretrained": cases.model("rwkv7")},
        ("neither `peft`",): {"pretrained": base, "tokenizer": cases.tokenizer(), "peft": "x"},
        ("PREFIX_TUNING", "--model hf"): {
            "pretrained": peft.get_peft_model(copy.deepcopy(base), prefix),
            "tokenizer": cases.tokenizer(),
        },
    }.items():
        with pytest.raises(ValueError) as refusal:
            WkvLM(**arguments)
        assert all(word in str(refusal.value) for word in words), refusal.value
        assert "\n" not in str(refusal.value)
    with pytest.raises(OSError):
        WkvLM(str(tmp_path / "missing"))
    with pytest.raises(TypeError, match="max_length"):
        WkvLM(str(folder), max_length=512)


def test_chat_templates(base, folder):
    lm, judge = WkvLM(str(folder), device="cpu"), hf(base)
    history = CHAT[1:]
    assert lm.apply_chat_template(history) == judge.apply_chat_template(history)
    partly = [*history, {"role": "assistant", "content": "Bec"}]
    assert lm.apply_chat_template(partly, False) == judge.apply_chat_template(partly, False)
    assert lm.chat_template(True) == judge.chat_template(True)
    refusal = "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    template = "{% for m in messages %}" + refusal + "{{ m.content }}{% endfor %}{{ enable_thinking }}"
    lm.tokenizer.chat_template = template
    assert lm.apply_chat_template(CHAT) == "Why?"
    lm.chat_template_args = {"enable_thinking": True}
    assert lm.apply_chat_template(CHAT) == "Why?True"


def test_thinking_is_left_out(base):
    prompt = ("the state", {"until": [], "max_gen_toks": 24})
    (text,) = ask(ours(base), "generate_until", [prompt])
    ids = cases.tokenizer().encode(text)
    end = text[5]
    judges = [ask(hf(base, think_end_token=token), "generate_until", [prompt]) for token in (end, ids[0])]
    assert [ask(ours(base, think_end_token=token), "generate_until", [prompt]) for token in (end, ids[0])] == judges
    assert judges[0] != [text] != judges[1]


def test_a_shipped_model_that_is_named_by_its_folder():
    """The numbers of `hf`, beyond the window that its configuration names too."""
    folder = str(wkv.demo_model_path())
    lm = WkvLM(folder, dtype="float32", device="cpu", batch_size=8)
    judge = hf(lm.model, tokenizer=lm.tokenizer)
    text = "We shall continue to work for peace, and the people of the United States know it. " * 40
    assert len(lm.tok_encode(text)) > lm.config.max_position_embeddings
    pairs = [(text + question, choice) for question in ("And so", "Then") for choice in (" we", " they do not")]
    assert_same_scores(ask(lm, "loglikelihood", pairs), ask(judge, "loglikelihood", pairs))
    # lm-eval adds in float32: what is left is its rounding.
    rolling = [ask(x, "loglikelihood_rolling", [text, text[:50]]) for x in (lm, judge)]
    assert rolling[0] == pytest.approx(rolling[1], rel=1e-6, abs=1e-4)
