"""Chat templates: the official prompts to the letter, clear errors, ids of a prompt that begin those with an answer."""

import itertools

import pytest
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from wkv.models.rwkv_chat_templates import CHAT_TEMPLATES
from wkv.vocabulary import build_tokenizer, pile_tokenizer_file

SYSTEM = {"role": "system", "content": " Be brief.\r\n\r\nBe kind. "}
USER = {"role": "user", "content": "Hi!\n\n\n好。\n"}
ASSISTANT = {"role": "assistant", "content": "One.\n\nTwo. "}
PARTS = {"role": "user", "content": [{"type": "text", "text": "More"}, {"type": "text", "text": "please"}]}
SLOTS = {"date": {"type": "string"}, "duration_minutes": {"type": "integer"}}
TOOLS = [
    {"name": "find_free_slots", "description": "Find free calendar slots", "arguments": SLOTS},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
CALL = {"type": "function", "function": {"name": "find_free_slots", "arguments": {"date": "2026-05-08", "who": "é"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
OUTPUT = {"role": "tool", "content": '{"free_slots":[]}\n'}


@pytest.fixture(scope="module")
def tokenizers():
    world, pile = build_tokenizer(), build_tokenizer(pile_tokenizer_file())
    return {"world": world, "g1": world, "raven": pile}


@pytest.fixture
def render(tokenizers):
    def render(name: str, *messages: dict, prompt: bool = True, **options) -> str:
        template = CHAT_TEMPLATES[name]
        arguments = {"add_generation_prompt": prompt, "tokenize": False, "chat_template": template} | options
        return tokenizers[name].apply_chat_template(list(messages), **arguments)

    return render


@pytest.mark.parametrize("name", ["world", "g1"])
def test_world_and_g1_chat(name, render):
    assert render(name, SYSTEM, USER, ASSISTANT, PARTS) == (
        "System: Be brief.\nBe kind.\n\nUser: Hi!\n好。\n\nAssistant: One.\n\nTwo.\n\nUser: More\nplease\n\nAssistant:"
    )
    assert render(name, USER, ASSISTANT, prompt=False) == "User: Hi!\n好。\n\nAssistant: One.\n\nTwo.\n\n"


def test_g1_thinks_when_asked(render):
    begin = "User: Hi!\n好。"
    assert render("g1", USER, enable_thinking=True) == f"{begin}\n\nAssistant: <think"
    assert render("g1", USER, enable_thinking=False) == f"{begin}\n\nAssistant: <think>\n</think"
    for effort, words in {"low": " (think a bit)", "medium": " (think)", "high": " (think a lot)"}.items():
        assert render("g1", USER, reasoning_effort=effort) == f"{begin}{words}\n\nAssistant: <think"
        whole = render("g1", USER, ASSISTANT, PARTS, reasoning_effort=effort)
        assert whole.startswith(begin + "\n\n") and whole.endswith(f"please{words}\n\nAssistant: <think")
    thought = {"role": "assistant", "reasoning_content": " Hm.\n", "content": "Yes."}
    assert render("g1", USER, thought, prompt=False).endswith("Assistant: <think>\nHm.\n</think>\nYes.\n\n")


def test_g1_calls_functions(render):
    tools = (
        'Tools:\n[\n{"name":"find_free_slots","description":"Find free calendar slots","arguments":{'
        '"date":{"type":"string"},"duration_minutes":{"type":"integer"}}},\n{"name":"now","description":"","arguments":{}}\n]\n'
        "Return only a JSON function call.\n\n"
    )
    assert render("g1", PARTS, tools=TOOLS) == f"System: {tools}User: More\nplease\n\nAssistant: ```json"
    assert render("g1", SYSTEM, PARTS, CALLED, OUTPUT, tools=TOOLS) == (
        f"System: Be brief.\nBe kind.\n{tools}User: More\nplease\n\nAssistant: ```json\n"
        '{"name":"find_free_slots","arguments":{"date":"2026-05-08","who":"é"}}\n```\n\n'
        'User: Function output:\n{"free_slots":[]}\n\nAssistant: ```json'
    )
    assert render("g1", PARTS, tools=TOOLS, enable_thinking=True).endswith("Assistant: <think")
    as_text = {"name": "now", "arguments": '{"a": 1}'}
    both = {"role": "assistant", "content": "Well.", "tool_calls": [as_text]}
    assert render("g1", USER, both, prompt=False).endswith(
        'Well.\n```json\n{"name":"now","arguments":{"a": 1}}\n```\n\n'
    )


def test_raven(render):
    assert render("raven", SYSTEM, USER, ASSISTANT, PARTS) == (
        "\nBe brief.\n\nBe kind.\n\nBob: Hi!\n好。\n\nAlice: One.\n\nTwo.\n\nBob: More\nplease\n\nAlice:"
    )
    begin = "\nBelow is an instruction that describes a task"
    end = ". Write a response that appropriately completes the request.\n\n# Instruction:\nHi!\n好。\n\n"
    assert render("raven", USER, instruction=True) == f"{begin}{end}# Response:\n"
    assert render("raven", USER, instruction=True, input="x\n\ny") == (
        f"{begin}, paired with an input that provides further context{end}# Input:\nx\ny\n\n# Response:\n"
    )
    assert render("raven", USER, ASSISTANT, instruction=True, prompt=False).endswith("# Response:\nOne.\n\nTwo.\n\n")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_roles_out_of_order_are_refused(name, render):
    for messages, complaint in {
        (0, 0): "message 2: role 'user' cannot follow user",
        (1,): "message 1: role 'assistant' cannot follow the start",
        (0, 1, 1): "message 3: role 'assistant' cannot follow assistant",
        (0, 2): "message 2: role 'system' cannot follow user",
        (2, 1): "message 2: role 'assistant' cannot follow system",
        (0, 3): "role 'tool' is not one of system, user, assistant"
        if name != "g1"
        else "message 2: role 'tool' cannot follow user",
        (4,): "role 'critic' is not one of system, user, assistant",
    }.items():
        rows = [(USER, ASSISTANT, SYSTEM, OUTPUT, {"role": "critic", "content": "no"})[index] for index in messages]
        with pytest.raises(TemplateError) as error:
            render(name, *rows)
        assert str(error.value).startswith(complaint)
    with pytest.raises(ValueError, match="empty conversation"):
        render(name)


def test_what_a_template_cannot_say_is_refused(render):
    for name, messages, options, complaint in (
        ("g1", [USER], {"reasoning_effort": "much"}, "reasoning_effort 'much' is not one of low, medium, high"),
        ("g1", [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}], {}, "message 2: one function call a message"),
        ("raven", [USER, ASSISTANT, USER], {"instruction": True}, "an instruction is one user message"),
    ):
        with pytest.raises(TemplateError, match=complaint):
            render(name, *messages, **options)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_continuing_the_last_message(name, render):
    whole = render(name, USER, ASSISTANT, prompt=False)
    continued = render(name, USER, ASSISTANT, prompt=False, continue_final_message=True)
    assert continued == whole.removesuffix("\n\n")


CODE = "\n\n\tcode"
ANSWERS = [
    *[("world", {}, answer) for answer in ("yo", "<think>\n</think>", "。好", CODE, "", "😀", "(a)\n\n(b)")],
    *[("g1", {"enable_thinking": True}, f"<think>\n{answer}\n</think>\nSo.") for answer in ("yo", "好", "(a)\n\n(b)")],
    *[("g1", {"enable_thinking": False}, f"<think>\n</think>\n{answer}") for answer in ("yo", "好", "(a)\n\n(b)")],
    *[("g1", {"tools": TOOLS}, f"```json\n{call}\n```") for call in ('{"name":"now"}', "[]")],
    *[("raven", {}, answer) for answer in ("yo", "。好", CODE, "😀", "(a)\n\n(b)")],
    *[("raven", {"instruction": True}, answer) for answer in ("yo", "好", "(a)\n\n(b)")],
]


@pytest.mark.parametrize("name, options, answer", ANSWERS, ids=ascii)
def test_a_prompt_is_a_prefix_of_prompt_and_answer(name, options, answer, tokenizers):
    tokenizer, prompt = tokenizers[name], [SYSTEM, USER][options.get("instruction", False) :]
    options = {"chat_template": CHAT_TEMPLATES[name], **options}
    whole = tokenizer.apply_chat_template(
        [*prompt, {"role": "assistant", "content": answer}],
        return_dict=True,
        return_assistant_tokens_mask=True,
        **options,
    )
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False, **options)
    ids, mask = whole["input_ids"], whole["assistant_masks"]
    assert ids[: len(start)] == start
    # The mask begins behind "Assistant:", the prompt may hold the beginning of the answer as well.
    first = mask.index(1)
    assert first <= len(start) and mask == [0] * first + [1] * (len(ids) - first)
    space = "" if options.get("instruction") else " "
    assert tokenizer.decode(ids[first:]) == f"{space}{answer.strip()}\n\n"
    assert first == len(start) or name == "g1"


def test_masks_of_several_answers(tokenizers):
    """Each answer with the blank line that ends it, and nothing else."""
    for name in CHAT_TEMPLATES:
        tokenizer = tokenizers[name]
        whole = tokenizer.apply_chat_template(
            [USER, ASSISTANT, PARTS, {"role": "assistant", "content": "3"}],
            chat_template=CHAT_TEMPLATES[name],
            return_assistant_tokens_mask=True,
        )
        pairs = zip(whole["input_ids"], whole["assistant_masks"], strict=True)
        answers = itertools.groupby(pairs, key=lambda pair: pair[1])
        said = [tokenizer.decode([index for index, _ in group]) for mask, group in answers if mask]
        assert said == [" One.\n\nTwo.\n\n", " 3\n\n"]


def test_without_wkv_a_template_says_the_same(tmp_path):
    ours = build_tokenizer(pieces=[b"\n\n", b"User", b"```json"], chat_template="g1")
    ours.save_pretrained(tmp_path)
    plain = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert plain.chat_template == CHAT_TEMPLATES["g1"]
    for tools in (None, TOOLS):
        options = {"return_dict": True, "return_assistant_tokens_mask": True, "tools": tools}
        rows = [tokenizer.apply_chat_template([USER, ASSISTANT], **options) for tokenizer in (plain, ours)]
        assert dict(rows[0]) == dict(rows[1])
