"""Bits per UTF-8 byte that a causal language model needs for texts: comparable between tokenizers, lower is better."""

import math

import datasets
import evaluate

from wkv.text_scores import log_likelihoods, model_and_tokenizer

DESCRIPTION = """
The number of bits per UTF-8 byte that a text costs when its tokens are coded by the model's predictions. It does not
depend on the tokenizer, so models of different vocabularies can be compared.
"""
ARGUMENTS = """
Args:
    predictions (list of str): the texts, of any length, each read on its own; none may be empty.
    model, tokenizer: any causal language model of transformers, and its tokenizer; or instead of both
    model_id (str): a folder or a repository to load them from.
    max_length (int): for models that are not RWKV, the tokens of a window; by default all positions that it has.
    stride (int): the distance between the beginnings of two windows, by default half of `max_length`.
    start_token (int): what every text is read after, by default the tokenizer's bos token, or its eos token.
Returns:
    bits_per_byte (list of float): of every text; mean_bits_per_byte (float): their mean;
    total_bits_per_byte (float): all bits by all bytes, as if the texts were one.
Examples:
    >>> bits_per_byte = evaluate.load("eval/metrics/bits_per_byte")
    >>> bits_per_byte.compute(predictions=["My fellow Americans,"], model_id=str(wkv.demo_model_path()))
"""


class BitsPerByte(evaluate.Metric):
    """An RWKV model carries its state through a text; another one reads a long text in windows that overlap."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=ARGUMENTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model=None, tokenizer=None, model_id=None, **options):
        model, tokenizer = model_and_tokenizer(model, tokenizer, model_id)
        bits = [-log_likelihoods(model, tokenizer, text, **options).sum().item() / math.log(2) for text in predictions]
        sizes = [len(text.encode()) for text in predictions]
        values = [b / size for b, size in zip(bits, sizes, strict=True)]
        return {
            "bits_per_byte": values,
            "mean_bits_per_byte": sum(values) / len(values),
            "total_bits_per_byte": sum(bits) / sum(sizes),
        }
