"""The perplexity of a causal language model on texts: comparable between models of one tokenizer, lower is better."""

import math

import datasets
import evaluate

from wkv.text_scores import log_likelihoods, model_and_tokenizer

DESCRIPTION = """
The exponential of the mean negative log-likelihood of a text's tokens: among how many equally likely tokens the model
chooses. It counts tokens, so it depends on the tokenizer; between vocabularies compare bits per byte.
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
    perplexities (list of float): of every text; mean_perplexity (float): their mean;
    total_perplexity (float): of all tokens, as if the texts were one.
Examples:
    >>> perplexity = evaluate.load("eval/metrics/perplexity")
    >>> perplexity.compute(predictions=["My fellow Americans,"], model_id=str(wkv.demo_model_path()))
"""


class Perplexity(evaluate.Metric):
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
        nats = [-log_likelihoods(model, tokenizer, text, **options) for text in predictions]
        values = [math.exp(n.mean()) for n in nats]
        return {
            "perplexities": values,
            "mean_perplexity": sum(values) / len(values),
            "total_perplexity": math.exp(sum(n.sum().item() for n in nats) / sum(map(len, nats))),
        }
