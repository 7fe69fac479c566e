"""lm-eval's model "wkv": the scores of lm-eval's own `hf`, computed as an RNN can.

    lm_eval run --model wkv --model_args pretrained=FOLDER --tasks ... --batch_size auto

after `wkv activate`; from Python, `import wkv` and `lm_eval.simple_evaluate(model="wkv", ...)` or `WkvLM(...)`. What
texts have in common, few-shot examples and the contexts of choices, is read once, and a choice of one token is answered
without reading it. An RNN has no window: nothing is cut off at `max_position_embeddings`, where `hf` truncates contexts
and splits long texts, and a text to be scored as a whole is read with one state from end to end. Below that length the
numbers are those of `hf`, which in half precision rounds log-probabilities to the model's dtype; here they are float32.
"""

import sys
from collections.abc import Iterator, Sequence

import jinja2
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .evaluation_answers import Answers, model_identity
from .evaluation_generating import generate_all
from .evaluation_loading import load_model, load_tokenizer, plain_model, prompt_state
from .evaluation_reading import Limits, Scores, limits_by_memory

logger = logging.get_logger(__name__)

# What the official evaluations begin every text with.
LEADING_TOKEN = 0


class WkvLM(TemplateLM):
    """An RWKV model for lm-eval; keywords that lm-eval's HFLM has too mean the same.

    `pretrained` is a folder, a repository or a model; `batch_size` "auto", or how many of the longest texts as many
    tokens as run at a time would make; `max_batch_size` bounds the texts that run side by side. `leading_token` puts
    token 0 before every text, as the official evaluations do. `cache` is a file that keeps the finished answers: an
    evaluation that was killed goes on from there. `tokens_asked` and `tokens_computed` count the
    tokens of all requests, as `hf` reads them, and those that ran through the model. Raises ValueError for models that
    are not RWKV, and where there is no tokenizer.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        peft: str | None = None,
        revision: str = "main",
        subfolder: str = "",
        gguf_file: str | None = None,
        trust_remote_code: bool = False,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        leading_token: bool = False,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        cache: str | None = None,
        chat_template_args: dict | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
    ):
        super().__init__()
        hub = {"revision": revision, "subfolder": subfolder, "trust_remote_code": trust_remote_code}
        loaded = load_model(pretrained, peft, dtype, device, gguf_file, **hub)
        self.tokenizer = load_tokenizer(tokenizer, pretrained, loaded, gguf_file, **hub)
        self._model, self.model = loaded, plain_model(loaded).eval()
        self._device = self.model.device
        self.start = prompt_state(loaded)
        # HFLM's auto:N finds the batch size anew N times.
        self.batch_size = "auto" if str(batch_size).startswith("auto") else int(batch_size)
        self.max_batch_size = max_batch_size
        self.leading_token, self.add_bos_token = leading_token, add_bos_token
        self.custom_prefix_token_id = prefix_token_id
        self.chat_template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = enable_thinking
        self.think_end_token = think_end_token
        self.tokens_asked = self.tokens_computed = 0
        self.answers = None if cache is None else Answers(cache, model_identity(loaded, self.tokenizer))

    @property
    def config(self):
        return self.model.config

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows."""
        ids = self.custom_prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, LEADING_TOKEN
        return next(index for index in ids if index is not None)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The history as the tokenizer's template has it; without its system message where the template refuses one."""
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **self.chat_template_args,
        }
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except jinja2.exceptions.TemplateError:
            logger.warning("the chat template refuses the history, which is taken without its system message")
            rest = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(rest, **options)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Ids of a text, with the special tokens that the tokenizer adds unless the text begins with one."""
        if add_special_tokens is None:
            has_it = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = self.add_bos_token is not False and not has_it
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding gives it) for each (context, continuation)."""
        pairs = [self._encode_request(*request.args) for request in requests]
        answers = self._score("loglikelihood", pairs, disable_tqdm)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each (text,), all of it, after the leading or the prefix token."""
        pairs = [(self._with_leading([]), self.tok_encode(text)) for (text,) in (request.args for request in requests)]
        answers = [total for total, _ in self._score("loglikelihood_rolling", pairs, disable_tqdm)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each (context, options), up to the first stop string or `max_gen_toks` tokens."""
        contexts = [self._with_leading(self.tok_encode(request.args[0])) for request in requests]
        options = [request.args[1] for request in requests]
        thinking = {"think_end_token": self.think_end_token}
        keys = [
            self._key("generate_until", ids, options=o | thinking) for ids, o in zip(contexts, options, strict=True)
        ]
        # Sampled texts are to differ from each other, and are made again.
        keys = [None if o.get("do_sample") else key for key, o in zip(keys, options, strict=True)]

        def compute(missing: list[int]) -> Iterator[list[tuple[int, str]]]:
            yield from generate_all(self, [contexts[i] for i in missing], [options[i] for i in missing], missing)

        answers = self._answer("generate_until", keys, compute, disable_tqdm)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        return self._score("loglikelihood", [(context, ids) for _, context, ids in requests], disable_tqdm)

    def limits(self, lengths: Sequence[int]) -> Limits:
        """How much runs at a time, given the lengths of all texts."""
        limits = limits_by_memory(self.model)
        if self.batch_size != "auto":
            limits = limits._replace(tokens=min(limits.tokens, self.batch_size * max(lengths)))
        return limits if self.max_batch_size is None else limits._replace(rows=min(limits.rows, self.max_batch_size))

    def _encode_request(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of context and continuation, as lm-eval splits them; at least one of context."""
        if context == "":
            ids = self.tok_encode(continuation, add_special_tokens=False)
            first = self._with_leading([])
            return (first, ids[1:]) if ids[:1] == first else (first, ids)
        context_ids, ids = self._encode_pair(context, continuation)
        if not ids and continuation:
            # A token joins the two, and lm-eval's split leaves it to neither.
            whole = self.tok_encode(context + continuation)
            shared = [a == b for a, b in zip(context_ids, whole, strict=False)]
            split = shared.index(False) if False in shared else len(shared)
            context_ids, ids = whole[:split], whole[split:]
        return self._with_leading(context_ids), ids

    def _with_leading(self, ids: list[int]) -> list[int]:
        if self.leading_token and ids[:1] != [LEADING_TOKEN]:
            return [LEADING_TOKEN, *ids]
        return ids or [self.prefix_token_id]

    def _key(self, kind: str, *ids, options: dict | None = None) -> str | None:
        return None if self.answers is None else self.answers.key(kind, *ids, options=options)

    def _score(self, kind: str, pairs: list[tuple[list[int], list[int]]], disable_tqdm: bool):
        keys = [self._key("loglikelihood", *pair) for pair in pairs]

        def compute(missing: list[int]) -> Iterator[list[tuple[int, tuple[float, bool]]]]:
            yield [(i, (0.0, True)) for i in missing if not pairs[i][1]]
            missing = [i for i in missing if pairs[i][1]]
            if not missing:
                return
            texts = [np.array([*pairs[i][0], *pairs[i][1]]) for i in missing]
            scores = Scores(self.model, texts, [len(pairs[i][0]) for i in missing])
            self.tokens_asked += sum(map(len, scores.read))
            for finished in scores.run(self.limits(list(map(len, scores.read))), self.start):
                yield [(missing[j], (float(scores.sums[j]), bool(scores.greedy[j]))) for j in finished]
            self.tokens_computed += scores.tokens_read

        return list(map(tuple, self._answer(kind, keys, compute, disable_tqdm)))

    def _answer(self, kind: str, keys: list[str | None], compute, disable_tqdm: bool) -> list:
        """The answers to all requests: those kept in the file, and what `compute(missing)` yields in batches."""
        results = [None if key is None else self.answers.get(key) for key in keys]
        missing = [i for i, result in enumerate(results) if result is None]
        asked, computed = self.tokens_asked, self.tokens_computed
        held = len(keys) - len(missing)
        with tqdm(total=len(keys), initial=held, desc=f"Running {kind} requests", disable=disable_tqdm) as bar:
            for batch in compute(missing):
                for i, answer in batch:
                    results[i] = answer
                if self.answers is not None:
                    self.answers.add((keys[i], answer) for i, answer in batch if keys[i] is not None)
                bar.update(len(batch))
        if self.tokens_asked > asked:
            asked, computed = self.tokens_asked - asked, self.tokens_computed - computed
            print(f"wkv: {asked:,} tokens asked for, {computed:,} computed ({kind})", file=sys.stderr)
        return results
