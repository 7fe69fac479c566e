"""lm-eval's model `wkv` gives the numbers of lm-eval's own HFLM, with fewer tokens."""

import copy

import evaluation_cases as cases
import numpy as np
import pytest
import torch
from conftest import TINY
from evaluation_cases import PAIRS, PROMPTS, QUESTIONS, TEXTS, ask, assert_same_scores, direct, hf, ours

from wkv import evaluation_reading
from wkv.evaluation_reading import Limits
from wkv.evaluation_tree import prefix_tree, want

KINDS = {"loglikelihood": PAIRS, "loglikelihood_rolling": TEXTS, "generate_until": PROMPTS}


@pytest.fixture(scope="module")
def _models():
    return {model_type: cases.model(model_type) for model_type in TINY}


@pytest.fixture
def model(model_type, _models):
    return _models[model_type]


@pytest.fixture(scope="module")
def _expected():
    return {}


@pytest.fixture
def expected(model_type, model, _expected):
    """What HFLM answers to the requests of each kind."""
    if model_type not in _expected:
        _expected[model_type] = {kind: ask(hf(model), kind, arguments) for kind, arguments in KINDS.items()}
    return _expected[model_type]


@pytest.mark.parametrize("batch_size", [1, 8, "auto"])
def test_same_as_hf(model, expected, batch_size):
    lm = ours(model, batch_size=batch_size)
    assert_same_scores(ask(lm, "loglikelihood", PAIRS), expected["loglikelihood"])
    assert_same_scores(ask(lm, "loglikelihood_rolling", TEXTS), expected["loglikelihood_rolling"])
    assert ask(lm, "generate_until", PROMPTS) == expected["generate_until"]
    # Ids and texts of the cases are no test where everything is alike.
    assert len({flag for _, flag in expected["loglikelihood"]} | {""} ^ set(expected["generate_until"])) > 4


@pytest.mark.parametrize("tokens, rows", [(5, 2), (64, 2)])
def test_no_limit_of_memory_changes_a_number(model, expected, tokens, rows, monkeypatch):
    """Texts in slices, batches in parts, states that wait for memory and are given up."""
    lm, sizes, full = ours(model), [], []
    monkeypatch.setattr(lm, "limits", lambda lengths: Limits(tokens, rows))
    _record(monkeypatch, "_run", lambda *a: sizes.append((len(a[2]), sum(len(w.stretch) for w in a[2]))))
    _record(monkeypatch, "_next_level", lambda *a: full.append(a[2]))
    assert_same_scores(ask(lm, "loglikelihood", PAIRS), expected["loglikelihood"])
    assert True in full and False in full[full.index(True) :]
    assert_same_scores(ask(lm, "loglikelihood_rolling", TEXTS), expected["loglikelihood_rolling"])
    assert ask(lm, "generate_until", PROMPTS[:4]) == expected["generate_until"][:4]
    assert all(b <= rows and (total <= tokens or b == 1) for b, total in sizes)


def _record(monkeypatch, name, record):
    function = getattr(evaluation_reading, name)

    def recorded(*args):
        record(*args)
        return function(*args)

    monkeypatch.setattr(evaluation_reading, name, recorded)


def test_hf_is_right_on_our_classes(model, expected):
    """The judge itself, and `--model hf` for our models: by the definition of a log-probability."""
    lm = hf(model)
    answers = [direct(model, *lm._encode_pair(*pair)) for pair in PAIRS if pair[0]]
    assert_same_scores(
        answers, [answer for pair, answer in zip(PAIRS, expected["loglikelihood"], strict=True) if pair[0]]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(model, dtype):
    """Of float32 log-probabilities: nearer to those of the same weights in float32 than HFLM's."""
    half = copy.deepcopy(model).to(dtype)
    exact = np.array([p for p, _ in ask(ours(copy.deepcopy(half).float()), "loglikelihood", PAIRS)])
    errors = {
        name: np.sqrt(np.mean((np.array([p for p, _ in ask(lm, "loglikelihood", PAIRS)]) - exact) ** 2))
        for name, lm in {"ours": ours(half), "hf": hf(half, softmax_dtype="float32")}.items()
    }
    assert errors["ours"] <= 1.2 * errors["hf"] < 1


@pytest.fixture(scope="module")
def seven(_models):
    return _models["rwkv7"]


def test_leading_token(seven):
    """The official evaluations: token 0 before every text, and nothing else changes."""

    class Official(type(hf(seven))):
        def _encode_pair(self, context, continuation):
            context, continuation = super()._encode_pair(context, continuation)
            return [0, *context], continuation

    # Where a text is asked for with two splits, HFLM's cache of logits gives one the other's.
    judge = Official(pretrained=seven, tokenizer=cases.tokenizer(), max_length=10**6, logits_cache=False)
    expected = ask(judge, "loglikelihood", PAIRS), ask(judge, "loglikelihood_rolling", TEXTS)
    # Another prefix token takes its place nowhere.
    for options in ({}, {"prefix_token_id": 5}):
        lm = ours(seven, leading_token=True, **options)
        answers = ask(lm, "loglikelihood", PAIRS)
        assert_same_scores(answers, expected[0])
        assert_same_scores(ask(lm, "loglikelihood_rolling", TEXTS), expected[1])
    lm = ours(seven, leading_token=True)
    without = ask(ours(seven), "loglikelihood", PAIRS)
    assert max(abs(a[0] - b[0]) for a, b in zip(answers, without, strict=True)) > 0.1
    # A text that begins with the token has it once.
    text = cases.tokenizer().eos_token + "the state"
    assert ask(lm, "loglikelihood", [(text, " A")]) == ask(lm, "loglikelihood", [("the state", " A")])
    prompts = [(cases.tokenizer().eos_token + prompt, options) for prompt, options in PROMPTS[:4]]
    assert ask(lm, "generate_until", PROMPTS[:4]) == ask(hf(seven), "generate_until", prompts)


@pytest.mark.parametrize("add", [None, True, False])
def test_add_bos_token_is_that_of_hf(seven, add):
    tokenizer = cases.tokenizer()
    tokenizer.add_bos_token = True
    options = {"tokenizer": tokenizer, "add_bos_token": add}
    theirs, mine = hf(seven, **options), ours(seven, batch_size="auto:4", **options)
    assert mine.batch_size == "auto"
    assert mine.tok_encode("the state") == theirs.tok_encode("the state")
    assert_same_scores(ask(mine, "loglikelihood", PAIRS[:3]), ask(theirs, "loglikelihood", PAIRS[:3]))


def test_beams_are_refused(seven, monkeypatch):
    with pytest.raises(ValueError, match="num_beams=3: "):
        ask(ours(seven), "generate_until", [("the", {"until": [], "num_beams": 3})])
    monkeypatch.setattr(seven.generation_config, "num_beams", 2)
    with pytest.raises(ValueError, match="num_beams=2: "):
        ask(ours(seven), "generate_until", [("the", {"until": []})])


def test_what_hf_does_not_answer(seven):
    """Nothing to score, only spaces before it, and a token that joins a context with all of the continuation."""
    lm = ours(seven)
    assert ask(lm, "loglikelihood", [("the", ""), ("", "")]) == [(0.0, True)] * 2
    assert ask(lm, "loglikelihood_rolling", ["", "the"])[0] == 0.0
    encode = lm.tok_encode
    expected = [direct(seven, [0], encode("  A")), direct(seven, encode("f"), encode("(x"))]
    assert_same_scores(ask(lm, "loglikelihood", [("  ", "A"), ("f(", "x")]), expected)
    assert ask(lm, "loglikelihood", []) == ask(lm, "generate_until", []) == []
    (text,) = ask(lm, "generate_until", [("", {"until": [], "max_gen_toks": 3})])
    assert len(text) > 0


def test_tokens_are_computed_once(seven):
    lm = ours(seven)
    few_shot, question, choice = (len(lm.tok_encode(text)) for text in (cases.FEW_SHOT, "What?", " the union"))
    ask(lm, "loglikelihood", [(cases.FEW_SHOT + "What?", letter) for letter in cases.LETTERS])
    assert (lm.tokens_asked, lm.tokens_computed) == (4 * (few_shot + question), few_shot + question)

    lm.tokens_asked = lm.tokens_computed = 0
    pairs = [
        (cases.FEW_SHOT + q, c) for q in ("What?", "Were?", "else?") for c in (" the union", " of state", " the union")
    ]
    ask(lm, "loglikelihood", pairs)
    assert lm.tokens_asked == 9 * (few_shot + question + choice - 1)
    # The last token of a choice is predicted and not read, and two choices are equal.
    assert few_shot + 3 * (question + 2) <= lm.tokens_computed <= few_shot + 3 * 2 * (question + 2)

    lm.tokens_asked = lm.tokens_computed = 0
    texts = ask(lm, "generate_until", [(cases.FEW_SHOT + q, cases.GREEDY | {"until": []}) for q in ("What?", "else?")])
    assert lm.tokens_asked - lm.tokens_computed == few_shot
    assert len(texts) == 2


def test_hundred_questions_cost_a_tenth(seven):
    """Four choices of several tokens after five solved questions, as most tasks have them."""
    lm = ours(seven)
    pairs = [
        (f"{cases.FEW_SHOT}Question {i}: {'why ' * (i % 7)}?\nAnswer:", f" the {i * j} union")
        for i in range(100)
        for j in range(4)
    ]
    ask(lm, "loglikelihood", pairs)
    assert 0 < 7 * lm.tokens_computed < lm.tokens_asked


def test_too_little_memory_on_a_device_halves_the_batch(seven, monkeypatch):
    expected, run_blocks, refused = ask(ours(seven), "loglikelihood", PAIRS), type(seven.base_model).run_blocks, []

    def small(self, cache, ids, plan):
        if ids.numel() > 40:
            refused.append(ids.shape)
            raise torch.OutOfMemoryError
        return run_blocks(self, cache, ids, plan)

    lm = ours(seven)
    monkeypatch.setattr(type(seven.base_model), "run_blocks", small)
    assert_same_scores(ask(lm, "loglikelihood", PAIRS), expected)
    assert refused


def test_sampling_honours_its_options(seven):
    lm = ours(seven)
    prompt = ("the state", {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0})
    torch.manual_seed(1)
    assert len(set(ask(lm, "generate_until", [prompt] * 4))) > 1
    cold = ("the state", prompt[1] | {"temperature": 1e-4})
    greedy = ("the state", {"until": [], "max_gen_toks": 12})
    assert len(set(ask(lm, "generate_until", [cold, greedy, ("the state", cold[1] | {"top_k": 1})]))) == 1
    assert ask(lm, "generate_until", [("the state", greedy[1] | {"max_gen_toks": 4})])[0] != ""


def test_rows_stop_by_themselves(seven):
    """A row that met its stop string costs nothing more, and says nothing after it."""
    lm = ours(seven)
    (text,) = ask(lm, "generate_until", [("the state", {"until": [], "max_gen_toks": 20})])
    stop = text[3:5]
    lm.tokens_computed = 0
    assert ask(lm, "generate_until", [("the state", {"until": [stop], "max_gen_toks": 20})]) == [text.split(stop)[0]]
    assert lm.tokens_computed < 20
    # In a batch, one that is done counts no more tokens than alone, but for one that may have been its end token.
    prompts = [(prompt, {"until": [stop], "max_gen_toks": 20}) for prompt in ("the state", QUESTIONS[1], "t")]
    alone = []
    for prompt in prompts:
        lm.tokens_asked = 0
        ask(lm, "generate_until", [prompt])
        alone.append(lm.tokens_asked - len(lm.tok_encode(prompt[0])))
    lm.tokens_asked = 0
    ask(lm, "generate_until", prompts)
    more = lm.tokens_asked - sum(len(lm.tok_encode(prompt)) for prompt, _ in prompts) - sum(alone)
    assert 0 <= more <= len(prompts) < max(alone) - min(alone)


@pytest.mark.parametrize("stop_at_ends", [False, True])
def test_trees_hold_every_text(stop_at_ends):
    random = np.random.default_rng(0)
    for _ in range(60):
        n = random.integers(1, 12)
        texts = [random.integers(0, 2, random.integers(1, 60)) for _ in range(n)]
        texts += [text[: random.integers(1, len(text) + 1)] for text in texts] + [texts[0]]
        firsts = [int(random.integers(0, len(text))) for text in texts]
        root = prefix_tree(texts, stop_at_ends)
        want(root, firsts, list(map(len, texts)))
        seen = [[] for _ in texts]
        ended = []
        todo = [(root, np.empty(0, int))]
        while todo:
            stretch, before = todo.pop()
            assert len(before) == stretch.begin
            whole = np.concatenate([before, texts[stretch.text][stretch.begin : stretch.end]])
            for text, first, last in stretch.wanted:
                assert stretch.begin <= first <= last < stretch.end
                assert np.array_equal(whole[: last + 1], texts[text][: last + 1])
                seen[text] += range(first, last + 1)
            if stop_at_ends:
                assert all(len(texts[text]) == stretch.end for text in stretch.ends)
            ended += stretch.ends
            todo += [(child, whole) for child in stretch.children]
        assert [sorted(positions) for positions in seen] == [
            list(range(first, len(text))) for first, text in zip(firsts, texts, strict=True)
        ]
        assert sorted(ended) == list(range(len(texts)))
