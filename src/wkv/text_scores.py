"""How likely a causal language model finds a text, token by token: what the metrics in `eval/metrics` are made of.

Letters: T tokens of the text, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

# Tokens whose logits exist at the same time.
SLICE = 512


def model_and_tokenizer(model=None, tokenizer=None, model_id: str | None = None):
    """The two that were given, or those in a folder or repository. Raises ValueError unless it is one of these."""
    given = model is not None, tokenizer is not None, model_id is not None
    if given == (False, False, True):
        return AutoModelForCausalLM.from_pretrained(model_id), AutoTokenizer.from_pretrained(model_id)
    if given != (True, True, False):
        raise ValueError("give `model` and `tokenizer`, or `model_id` alone")
    return model, tokenizer


def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    max_length: int | None = None,
    stride: int | None = None,
    start_token: int | None = None,
) -> Tensor:
    """Natural logarithms of the probabilities of a text's tokens, each after all before it; float64 (T,).

    A token is put before the text, so that its first one is predicted too: by default the tokenizer's for beginnings,
    or where it has none, for ends.

    An RWKV model reads the text in slices with one state, in constant memory, and every token sees the whole text
    before it. Another model does so up to `max_length` tokens, by default its `max_position_embeddings`. Of a longer
    text it reads windows of `max_length` tokens that begin every `stride` (by default half of that), and a token counts
    in the first window that predicts it: all but those of the first window see `max_length - stride` tokens or more.

    Raises ValueError for a text without tokens, a missing start token, impossible windows, and a model with an adapter
    that puts a learned prompt before every call.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError("an adapter with a learned prompt puts it before every part of a text; score it with `WkvLM`")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the text {text!r} has no tokens")
    starts = (start_token, tokenizer.bos_token_id, tokenizer.eos_token_id)
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise ValueError("the tokenizer has neither a bos nor an eos token; give `start_token`")
    ids = torch.tensor([start, *ids], device=model.device)  # (T + 1,)
    if _carries_state(model):
        if max_length is not None or stride is not None:
            raise ValueError("an RWKV model reads a text in one piece; leave out `max_length` and `stride`")
        parts = _in_slices(model, ids)
    else:
        parts = _in_windows(model, ids, max_length, stride)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return torch.cat(list(parts))
    finally:
        model.train(was_training)


def _carries_state(model: PreTrainedModel) -> bool:
    return set(getattr(model.config, "layer_types", None) or ()) == {"rwkv"}


def _in_slices(model, ids: Tensor) -> Iterator[Tensor]:
    cache = None
    for begin in range(0, len(ids) - 1, SLICE):
        end = min(begin + SLICE, len(ids) - 1)
        outputs = model(input_ids=ids[None, begin:end], past_key_values=cache, use_cache=True)
        cache = getattr(outputs, "past_key_values", None)
        if cache is None and end < len(ids) - 1:
            # A model that keeps nothing of the kind, Mamba for one, reads all at once.
            yield _of_targets(model(input_ids=ids[None, :-1]).logits[0], ids[1:])
            return
        yield _of_targets(outputs.logits[0], ids[begin + 1 : end + 1])


def _in_windows(model, ids: Tensor, max_length: int | None, stride: int | None) -> Iterator[Tensor]:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = positions or len(ids)
    max_length = longest if max_length is None else max_length
    stride = max(1, max_length // 2) if stride is None else stride
    if not 1 <= stride <= max_length <= longest:
        raise ValueError(
            f"windows of {max_length} tokens every {stride} tokens: 1 <= stride <= max_length <= {longest} must hold"
        )
    done = 0
    for begin in range(0, len(ids) - 1, stride):
        end = min(begin + max_length, len(ids) - 1)
        yield torch.cat(list(_in_slices(model, ids[begin : end + 1])))[done - begin :]
        done = end
        if end == len(ids) - 1:
            break


def _of_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """The log-probabilities of the targets (T,) by the logits (T, V)."""
    return -F.cross_entropy(logits.float(), targets, reduction="none").double()
