"""`make bench`: our operator and model against the other implementations, in one run, as ratios with their spread.

Every contender lives in a process of its own and they take turns, A B C A B C, so that a change of the machine's speed
meets all of them. A ratio is ours over theirs within one turn; the tables give the median and, in brackets, the
smallest and largest. The tables go to standard output as markdown, progress to standard error, random weights of the
measured shape to a cache folder; nothing else is written.

    python kernels/bench.py            # about ten minutes
    python kernels/bench.py --quick    # about two

Letters: T tokens, B batch, H heads, K head size.
"""

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

import bench_contenders
import bench_tables as tables
import psutil
from bench_process import Contender
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wkv-bench"
# name: the distribution to install, the class that runs it
MODELS = {
    "wkv": ("wkv", "bench_contenders.Wkv"),
    "rwkv": ("rwkv", "bench_contenders.Rwkv"),
    "rwkv7-hf": ("rwkv7-hf", "bench_contenders.Rwkv7Hf"),
    "Llama": ("transformers", "bench_contenders.Llama"),
}
FORMS = {
    "compiled": "compiled (`wkv_kernels`)",
    "chunked": "chunked, plain PyTorch (`chunk_wkv7`)",
    "naive chunks": "naive chunks, plain PyTorch",
    "loop": "loop over tokens (`naive_recurrent_wkv7`)",
}
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
# Free memory without which rwkv7-hf is not asked for a training step of 512 tokens.
RWKV7_HF_TRAINING_MEMORY = 20e9


class Bench:
    """The plan of a run: which contenders meet, how often, at what lengths. Each part returns markdown."""

    def __init__(self, shape: bench_contenders.Shape, quick: bool, threads: int, progress: Progress):
        self.shape, self.quick, self.threads, self.progress = shape, quick, threads, progress
        self.task = progress.add_task("weights", total=None)
        self.ids = random.Random(0).choices(range(1, shape.vocabulary), k=512)

    def say(self, text: str) -> None:
        """Progress."""
        self.progress.update(self.task, description=text)
        if not self.progress.console.is_terminal:
            print(text, file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """A finished part to standard output, so that an interrupted run leaves what it measured."""
        self.progress.stop()
        print(text, flush=True)
        self.progress.start()

    def take_turns(self, label: str, rounds: int, calls: dict) -> dict[str, list[float]]:
        """Seconds by name and turn, after a warm-up; `calls` holds name -> (contender, method, arguments)."""
        samples = {name: [] for name in calls}
        for turn in range(-1, rounds):
            for name, (contender, *call) in calls.items():
                self.say(f"{label}: {name}, {'warm-up' if turn < 0 else f'turn {turn + 1} of {rounds}'}")
                seconds = contender.call(*call)
                if seconds is not None and turn >= 0:
                    samples[name].append(seconds)
        return samples

    def start(self, names: list[str], dtype: str) -> dict[str, Contender]:
        """The processes of some models."""
        official, folder = bench_contenders.checkpoint_paths(self.shape, CACHE)
        return {name: Contender(*MODELS[name], self.threads, self.shape, official, folder, dtype) for name in names}

    def machine(self) -> str:
        """Bandwidth and matrix rate in the same run, to read the rest against."""
        machine = Contender("torch", "bench_contenders.Machine", self.threads)
        calls = {"memory": (machine, "read"), **{dtype: (machine, "product", dtype) for dtype in DTYPES}}
        seconds = {name: min(turns) for name, turns in self.take_turns("machine", 4, calls).items()}
        machine.close()
        rates = [f"{2 * 4096**3 / seconds[dtype] / 1e9:.0f} ({short})" for dtype, short in DTYPES.items()]
        return (
            f"{tables.processor()}, {self.threads} threads, torch {metadata.version('torch')}: reads "
            f"{2**30 / seconds['memory'] / 1e9:.0f} GB/s, multiplies matrices at {' and '.join(rates)} GFLOP/s.\n"
        )

    def operator(self) -> str:
        """Forward and backward of the operator alone, all forms in one process."""
        T, H = (64, 2) if self.shape.name == "tiny" else (512, 12)
        operator = Contender("wkv", "bench_operator.Wkv7", self.threads, T, H, 64)
        samples = self.take_turns("operator", 3 if self.quick else 7, {f: (operator, "step", f) for f in FORMS})
        errors = {form: operator.call("error", form) for form in FORMS}
        operator.close()
        title = f"`wkv7`, forward + backward, B=1 T={T} H={H} K=64, fp32"
        lines = [tables.heading(title, "ms", "compiled is faster by", "output differs from the loop by")]
        for form, name in FORMS.items():
            if operator.problem:
                lines.append(tables.line(name, operator.problem, "", ""))
                continue
            milliseconds = tables.number(1e3 * statistics.median(samples[form]))
            ratio = "" if form == "compiled" else tables.ratio(samples[form], samples["compiled"])
            lines.append(tables.line(name, milliseconds, ratio, "" if form == "loop" else f"{errors[form]:.0e}"))
        return "\n".join(lines) + "\n"

    def model_heading(self) -> str:
        versions = [tables.version(name) for name in ("wkv", "rwkv", "rwkv7-hf", "transformers")]
        title = f"tokens per second, RWKV-7 {self.shape.name}, random weights"
        return tables.heading(title, *versions[:3], f"Llama in {versions[3]}")

    def inference(self, dtype: str) -> str:
        """Prefill of 512 tokens, then decoding one by one, all models alive at once."""
        group = self.start(list(MODELS), dtype)
        rounds, few, many = (3, 4, 16) if self.quick else (5, 8, 32)
        counts = {name: few if name == "rwkv7-hf" else many for name in group}
        prefill = self.take_turns(f"prefill {dtype}", rounds, {n: (c, "prefill", self.ids) for n, c in group.items()})
        decode = self.take_turns(f"decode {dtype}", rounds, {n: (c, "decode", counts[n]) for n, c in group.items()})
        decode = {name: [seconds / counts[name] for seconds in turns] for name, turns in decode.items()}
        logits = {name: c.call("logits", self.ids[:32]) for name, c in group.items() if name != "Llama"}
        for name, theirs in logits.items():
            if theirs and logits["wkv"] and name != "wkv":
                worst = max(abs(x - y) for x, y in zip(theirs, logits["wkv"], strict=True))
                self.say(f"logits {dtype}: wkv and {name} differ by {worst:.1e} at most")
        for contender in group.values():
            contender.close()
        return "\n".join(
            self.row(f"{title}, {DTYPES[dtype]}", group, samples, tokens)
            for title, samples, tokens in (("prefill, 512 tokens", prefill, 512), ("decode, batch 1", decode, 1))
        )

    def training(self, dtype: str) -> str:
        """Forward, loss and backward over 512 tokens; two pairings, for rwkv7-hf needs most of the memory."""
        speeds, memory = {"rwkv": "-"}, {"rwkv": "-"}
        for other, rounds in (("Llama", 2 if self.quick else 4), ("rwkv7-hf", 2)):
            if other == "rwkv7-hf" and self.quick:
                speeds[other] = memory[other] = "not in a quick run"
            elif other == "rwkv7-hf" and psutil.virtual_memory().available < RWKV7_HF_TRAINING_MEMORY:
                speeds[other] = memory[other] = f"needs {RWKV7_HF_TRAINING_MEMORY / 1e9:.0f} GB of free memory"
            else:
                pair = self.start(["wkv", other], dtype)
                calls = {name: (contender, "train", self.ids) for name, contender in pair.items()}
                turns = self.take_turns(f"training step {dtype}", rounds, calls)
                for name, contender in pair.items():
                    contender.close()
                    speeds.setdefault(name, self.cell(name, contender, turns, 512))
                    memory.setdefault(name, f"{contender.peak / 1e9:.1f} GB" if turns[name] else "")
        return "\n".join(
            tables.line(f"{title}, {DTYPES[dtype]}", *(cells[name] for name in MODELS))
            for title, cells in (("training step, T = 512", speeds), ("peak memory of that", memory))
        )

    def row(self, title: str, group: dict[str, Contender], samples: dict, tokens: int) -> str:
        return tables.line(title, *(self.cell(name, group[name], samples, tokens) for name in MODELS))

    def cell(self, name: str, contender: Contender, samples: dict, tokens: int) -> str:
        """Tokens per second and, beside ours, the ratio; or why there is none."""
        if not samples[name]:
            return contender.problem
        return tables.speed(tokens, samples[name], samples["wkv"] if name != "wkv" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns, no training of rwkv7-hf: about two minutes")
    parser.add_argument("--shape", choices=bench_contenders.SHAPES, default="191m", help="tiny is to try the bench out")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    shape, start = bench_contenders.SHAPES[arguments.shape], time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bench = Bench(shape, arguments.quick, arguments.threads, progress)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(bench_contenders.write_checkpoint, (shape, CACHE))
        bench.show(bench.machine())
        bench.show(bench.operator())
        bench.show(bench.model_heading())
        for dtype in DTYPES:
            bench.show(bench.inference(dtype))
        for dtype in list(DTYPES)[: 1 if arguments.quick else None]:
            bench.show(bench.training(dtype))
    print(
        "\nAfter the colon: how many times faster `wkv` is, median and range of the turns. A training step here is "
        f"forward, loss and backward, without the optimizer. This run took {time.perf_counter() - start:.0f} s."
    )


if __name__ == "__main__":
    main()
