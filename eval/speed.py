"""How much sooner lm-eval's model `wkv` answers questions of four choices than its own `hf`, and the same numbers.

    python eval/speed.py [FOLDER] --questions 60

The questions are MMLU's few-shot examples, which ship with lm-eval: answered by a letter without and with five solved
ones before them, and by the text of a choice, as in ARC and HellaSwag. `hf` runs with the best of several batch sizes,
both in this process, in turn.

Of letters without examples `hf` too reads each context once, for it takes choices of one token from the same logits:
what is left to save are the logits of the other tokens and the padding.
"""

import argparse
import logging
import statistics
import sys
import time
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import wkv
from wkv.evaluation import WkvLM

sys.path.insert(0, str(Path(__file__).with_name("tasks")))
from data import mmlu_dev

SHOTS = 5


def question(row: dict) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True))
    return f"{row['question']}{choices}\nAnswer:"


def tasks(n: int) -> dict[str, list[tuple[str, str]]]:
    """(context, continuation) of `n` questions, by how they are asked."""
    rows = list(mmlu_dev()["test"])
    # Five of one subject for all, as MMLU's own tasks have them for the questions of a subject.
    solved, rows = rows[:SHOTS], rows[SHOTS :: max(1, len(rows) // n)][:n]
    head = "The following are multiple choice questions (with answers).\n\n"
    few_shot = head + "".join(f"{question(row)} {'ABCD'[row['answer']]}\n\n" for row in solved)
    return {
        "letters, 0-shot": [(head + question(row), f" {letter}") for row in rows for letter in "ABCD"],
        f"letters, {SHOTS}-shot": [(few_shot + question(row), f" {letter}") for row in rows for letter in "ABCD"],
        "choices, 0-shot": [
            (f"Question: {row['question']}\nAnswer:", f" {choice}") for row in rows for choice in row["choices"]
        ],
    }


def run(lm, pairs: list[tuple[str, str]]) -> tuple[float, list[tuple[float, bool]]]:
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    start = time.perf_counter()
    answers = lm.loglikelihood(requests, disable_tqdm=True)
    return time.perf_counter() - start, answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=wkv.demo_model_path())
    parser.add_argument("--tokenizer", help="by default the model's, or the shipped model's where it has none")
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32], help="of hf")
    parser.add_argument("--task", help="only the task whose name begins so", default="")
    args = parser.parse_args()
    logging.disable(logging.WARNING)

    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=getattr(torch, args.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.folder)
    ours = WkvLM(pretrained=model, tokenizer=tokenizer)
    print(f"{torch.get_num_threads()} threads, {args.dtype}; hf / wkv: medians of {args.rounds} rounds, and the range")
    for name, pairs in tasks(args.questions).items():
        if not name.startswith(args.task):
            continue
        hf = {n: HFLM(pretrained=model, tokenizer=tokenizer, max_length=10**6, batch_size=n) for n in args.batch_sizes}
        best = min(hf, key=lambda n: run(hf[n], pairs[: len(pairs) // 3])[0])
        run(ours, pairs[:8])
        ours.tokens_asked = ours.tokens_computed = 0
        seconds, ratios = [], []
        for _ in range(args.rounds):
            theirs, expected = run(hf[best], pairs)
            mine, answers = run(ours, pairs)
            seconds.append((theirs, mine))
            ratios.append(theirs / mine)
        error = max(abs(a[0] - b[0]) for a, b in zip(answers, expected, strict=True))
        differing = sum(a[1] != b[1] for a, b in zip(answers, expected, strict=True))
        theirs, mine = map(statistics.median, zip(*seconds, strict=True))
        print(
            f"{name:16} {theirs:6.2f} s with batches of {best:2} / {mine:5.2f} s = "
            f"{statistics.median(ratios):4.1f} ({min(ratios):.1f} to {max(ratios):.1f}); tokens asked / computed = "
            f"{ours.tokens_asked / ours.tokens_computed:4.1f}; largest difference {error:.0e}, {differing} greedy flags"
        )


if __name__ == "__main__":
    main()
