"""What the tests of lm-eval's model `wkv` share: a tokenizer for tiny models, requests of every kind, and HFLM.

HFLM is the judge; it is told of a window that nothing here exceeds.
"""

import copy

import numpy as np
import torch
from conftest import busy_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers.cache_utils import DynamicCache

from wkv.evaluation import WkvLM
from wkv.models.tokenization_rwkv import RwkvTokenizer

# Pieces beside the single bytes. "(x" and "t)" join a context and a continuation.
PIECES = [" A", " B", " C", " D", " the", "the", " of", "ing", "Answer", "\n\n", " state", " union", "(x", "t)"]
VOCABULARY = {i + 1: bytes([i]) for i in range(256)} | {257 + i: p.encode() for i, p in enumerate(PIECES)}
VOCAB_SIZE = 280

FEW_SHOT = "What is the union?\nAnswer: A\n\nWhat of the state?\nAnswer: C\n\n"
LETTERS = [f" {letter}" for letter in "ABCD"]
QUESTIONS = ["Is it the state of the state?", "What is a union?", "Why?", "What is a union of the states, and why?"]
PAIRS = [
    *((f"{FEW_SHOT}{question}\nAnswer:", letter) for question in QUESTIONS for letter in LETTERS),
    *(
        (f"{FEW_SHOT}{QUESTIONS[2]}\nAnswer:", choice)
        for choice in (" the union", " the state of it", " x", " the union")
    ),
    *((question, choice) for question in QUESTIONS for choice in (" it is", " the state", "\n\n")),
    # Contexts that go on from one another, answers that are contexts.
    ("the", " state"),
    ("the state", " of"),
    ("the state of", " the union"),
    ("the state of the union", " A"),
    ("", "the state"),
    ("", " A"),
    # Spaces that belong to the continuation, a token that joins both and one that ends before the context does.
    ("the ", "state"),
    ("the  ", "A"),
    ("f(", "xy"),
    ("last", "t) of"),
]
TEXTS = [
    "the state of the union " * 9,
    "a",
    "What is the union?\n\nThe union is the state.",
    "the state of the union is",
]
GREEDY = {"until": ["\n\n", " union"], "max_gen_toks": 9}
PROMPTS = [
    *((f"{FEW_SHOT}{question}\nAnswer:", GREEDY) for question in QUESTIONS),
    ("the state", {"until": [], "max_gen_toks": 5}),
    ("the state of", {"until": [], "max_gen_toks": 5}),
    ("the state", {"until": [], "max_gen_toks": 5}),
    ("t", {"until": ["e"], "max_gen_toks": 12}),
    (QUESTIONS[0], GREEDY | {"repetition_penalty": 1.3}),
]


def tokenizer() -> RwkvTokenizer:
    return RwkvTokenizer.from_vocabulary(VOCABULARY)


def model(model_type: str):
    return busy_model(model_type, vocab_size=VOCAB_SIZE)


def requests(kind: str, arguments: list) -> list[Instance]:
    return [Instance(kind, {}, copy.deepcopy(args if isinstance(args, tuple) else (args,)), 0) for args in arguments]


def ask(lm, kind: str, arguments: list) -> list:
    return getattr(lm, kind)(requests(kind, arguments), disable_tqdm=True)


def hf(model, **options) -> HFLM:
    return HFLM(pretrained=model, **{"tokenizer": tokenizer(), "max_length": 10**6, "batch_size": 8, **options})


def ours(model, **options) -> WkvLM:
    return WkvLM(pretrained=model, **{"tokenizer": tokenizer(), **options})


def assert_same_scores(actual: list, expected: list) -> None:
    """Log-probabilities, and flags where there are any, item by item."""
    assert len(actual) == len(expected) > 0
    for i, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        if isinstance(theirs, tuple):
            assert mine[1] == theirs[1], f"item {i}: greedy {mine[1]}, by HFLM {theirs[1]}"
            mine, theirs = mine[0], theirs[0]
        # Of thousands of nats two float32 ulps are more than 1e-4, and HFLM adds in float32.
        tolerance = max(1e-4, 2 * float(np.spacing(np.float32(abs(theirs)))))
        # Written so that NaN fails.
        assert abs(mine - theirs) <= tolerance, f"item {i}: {mine}, by HFLM {theirs}"


@torch.no_grad()
def direct(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The definition, without lm-eval: the whole text alone through the model."""
    ids = torch.tensor([context + continuation])
    log_p = model(ids).logits[0].double().log_softmax(-1)[len(context) - 1 : -1]
    target = ids[0, len(context) :]
    return float(log_p.gather(1, target[:, None]).sum()), bool((log_p.argmax(-1) == target).all())


@torch.no_grad()
def direct_choices(model, context: list[int], continuations: list[list[int]], slice_tokens: int = 3000) -> list:
    """As `direct`, of a context too long for all its logits: read once, in slices, and a copy of its state for each."""
    cache = DynamicCache(config=model.config)
    for part in torch.tensor([context]).split(slice_tokens, 1):
        first = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0]
    answers = []
    for ids in map(torch.tensor, continuations):
        logits = first
        if len(ids) > 1:
            rest = model(ids[None, :-1], past_key_values=copy.deepcopy(cache), use_cache=True).logits[0]
            logits = torch.cat([first, rest])
        log_p = logits.double().log_softmax(-1)
        answers.append((float(log_p.gather(1, ids[:, None]).sum()), bool((log_p.argmax(-1) == ids).all())))
    return answers
