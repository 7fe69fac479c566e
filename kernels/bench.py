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
import platform
import random
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path

import bench_contenders as contenders
import psutil
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wkv-bench"
MODELS = {
    "wkv": contenders.Wkv,
    "rwkv": contenders.Rwkv,
    "rwkv7-hf": contenders.Rwkv7Hf,
    "Llama": contenders.Llama,
}


# Free memory without which rwkv7-hf is not asked for a training step of 512 tokens.
RWKV7_HF_TRAINING_MEMORY = 20e9


class Contender:
    """A contender's process; `problem` says why it cannot be measured, `peak` is its largest memory in bytes."""

    def __init__(self, kind: type, threads: int, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.peak, self.problem, self.started = 0, None, False
        self.process = context.Process(target=contenders.serve, args=(theirs, kind, threads, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def _receive(self):
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return f"failed: exit code {self.process.exitcode}"

    def call(self, method: str, *arguments):
        """The result of a method of the contender, or None once there is a problem."""
        if not self.started:
            self.started, self.problem = True, self._receive()
        if self.problem:
            return None
        self.pipe.send((method, *arguments))
        answer = self._receive()
        if isinstance(answer, str):
            self.problem = answer
            return None
        result, self.peak = answer
        return result

    def close(self) -> None:
        if self.process.is_alive() and self.started and not self.problem:
            self.pipe.send(None)
        elif self.process.is_alive():
            self.process.kill()
        self.process.join()


class Bench:
    """The plan of a run: which contenders meet, how often, at what lengths."""

    def __init__(self, shape: contenders.Shape, quick: bool, threads: int, progress: Progress):
        self.shape, self.quick, self.threads, self.progress = shape, quick, threads, progress
        self.task = progress.add_task("weights", total=None)
        self.ids = random.Random(0).choices(range(1, shape.vocabulary), k=512)

    def say(self, text: str) -> None:
        self.progress.update(self.task, description=text)
        if not self.progress.console.is_terminal:
            print(text, file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """A finished part to standard output, so that an interrupted run leaves what it measured."""
        self.progress.stop()
        print(text, flush=True)
        self.progress.start()

    def take_turns(self, group: dict[str, Contender], rounds: int, label: str, *call, warm_up=True):
        """Seconds per contender and turn; a contender with a problem has none."""
        samples: dict[str, list[float]] = {name: [] for name in group}
        for turn in range(-1 if warm_up else 0, rounds):
            for name, contender in group.items():
                self.say(f"{label}: {name}, {'warm-up' if turn < 0 else f'turn {turn + 1} of {rounds}'}")
                seconds = contender.call(*call)
                if seconds is not None and turn >= 0:
                    samples[name].append(seconds)
        return samples

    def models(self, names: list[str], dtype: str) -> dict[str, Contender]:
        official, folder = CACHE / f"rwkv7-{self.shape.name}.pth", CACHE / f"rwkv7-{self.shape.name}"
        return {name: Contender(MODELS[name], self.threads, self.shape, official, folder, dtype) for name in names}

    def machine(self) -> str:
        """Bandwidth and matrix rate in the same run, to read the rest against."""
        machine = {"machine": Contender(contenders.Machine, self.threads)}
        read = min(self.take_turns(machine, 5, "memory bandwidth", "read")["machine"])
        rates = {
            dtype: 2 * 4096**3 / min(self.take_turns(machine, 3, f"products {dtype}", "product", dtype)["machine"])
            for dtype in ("float32", "bfloat16")
        }
        machine["machine"].close()
        return (
            f"{processor()}, {self.threads} threads, torch {metadata.version('torch')}: reads "
            f"{2**30 / read / 1e9:.0f} GB/s, multiplies matrices at {rates['float32'] / 1e9:.0f} GFLOP/s (fp32) and "
            f"{rates['bfloat16'] / 1e9:.0f} (bf16)."
        )

    def operator(self) -> str:
        """Forward and backward of the operator alone, all forms in one process."""
        operator = Contender(contenders.Wkv7, self.threads)
        forms = ["compiled", "chunked", "naive chunks", "loop"]
        samples: dict[str, list[float]] = {form: [] for form in forms}
        errors = {}
        for turn in range(-1, 3 if self.quick else 7):
            for form in forms:
                self.say(f"operator: {form}")
                seconds = operator.call("step", form)
                if seconds is not None and turn >= 0:
                    samples[form].append(seconds)
        for form in forms[:-1]:
            errors[form] = operator.call("error", form)
        operator.close()
        rows = [
            "| `wkv7`, forward + backward, B=1 T=512 H=12 K=64, fp32 | ms | compiled is faster by | differs by |",
            "|---|---|---|---|",
        ]
        titles = {
            "compiled": "compiled (`wkv_kernels`)",
            "chunked": "chunked, plain PyTorch (`chunk_wkv7`)",
            "naive chunks": "naive chunks, plain PyTorch",
            "loop": "loop over tokens (`naive_recurrent_wkv7`)",
        }
        for form in forms:
            if operator.problem:
                rows.append(f"| {titles[form]} | {operator.problem} | | |")
                continue
            ratio = "" if form == "compiled" else spread(ratios(samples[form], samples["compiled"]))
            error = f"{errors[form]:.0e}" if form in errors else ""
            rows.append(f"| {titles[form]} | {1e3 * statistics.median(samples[form]):.1f} | {ratio} | {error} |")
        return "\n".join(rows)

    def inference(self, dtype: str) -> list[str]:
        """Prefill of 512 tokens, then decoding one by one, all models alive at once."""
        group = self.models(list(MODELS), dtype)
        prefill = self.take_turns(group, 3 if self.quick else 5, f"prefill {dtype}", "prefill", self.ids)
        slow = {"rwkv7-hf": 4 if self.quick else 8}
        counts = {name: slow.get(name, 16 if self.quick else 32) for name in group}
        decode: dict[str, list[float]] = {name: [] for name in group}
        for turn in range(-1, 3 if self.quick else 5):
            for name, contender in group.items():
                self.say(f"decode {dtype}: {name}, {'warm-up' if turn < 0 else f'turn {turn + 1}'}")
                seconds = contender.call("decode", counts[name])
                if seconds is not None and turn >= 0:
                    decode[name].append(seconds / counts[name])
        logits = {name: c.call("logits", self.ids[:32]) for name, c in group.items() if name != "Llama"}
        for name, theirs in logits.items():
            if theirs and logits["wkv"] and name != "wkv":
                worst = max(abs(x - y) for x, y in zip(theirs, logits["wkv"], strict=True))
                self.progress.console.print(f"logits {dtype}, wkv and {name}: largest difference {worst:.1e}")
        for contender in group.values():
            contender.close()
        return [
            row(f"prefill, 512 tokens, {SHORT[dtype]}", group, prefill, 512),
            row(f"decode, batch 1, {SHORT[dtype]}", group, decode, 1),
        ]

    def training(self, dtype: str) -> list[str]:
        """Forward, loss and backward over 512 tokens; each pairing apart, for one of them needs most of the memory."""
        group, samples = {}, {}
        pairings = [(["wkv", "Llama"], 2 if self.quick else 4)]
        enough = psutil.virtual_memory().available > RWKV7_HF_TRAINING_MEMORY or self.shape.name == "tiny"
        if not self.quick and enough:
            pairings.append((["wkv", "rwkv7-hf"], 2))
        for names, rounds in pairings:
            pair = self.models(names, dtype)
            turns = self.take_turns(pair, rounds, f"training step {dtype}", "train", self.ids)
            for contender in pair.values():
                contender.close()
            other = names[1]
            group |= {other: pair[other], "wkv": group.get("wkv", pair["wkv"])}
            samples |= {other: turns[other], "wkv": samples.get("wkv", turns["wkv"])}
            samples[f"wkv beside {other}"] = turns["wkv"]
        return [
            row(f"training step, T = 512, {SHORT[dtype]}", group, samples, 512),
            "| "
            + " | ".join([f"its peak memory, {SHORT[dtype]}", *(memory(group.get(name)) for name in MODELS)])
            + " |",
        ]


SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def ratios(theirs: list[float], ours: list[float]) -> list[float]:
    """How many times longer they take than we do, turn by turn."""
    return [t / o for t, o in zip(theirs, ours, strict=False)]


def spread(values: list[float]) -> str:
    def short(value: float) -> str:
        return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 3 else f"{value:.2f}"

    return f"{short(statistics.median(values))}x ({short(min(values))}-{short(max(values))})"


def row(title: str, group: dict[str, Contender], samples: dict[str, list[float]], tokens: int) -> str:
    """One line of the table: tokens per second, and how many times faster ours is."""
    cells = [title]
    for name in MODELS:
        if name not in group:
            cells.append("")
        elif not samples[name]:
            cells.append(group[name].problem or "")
        else:
            speed = tokens / statistics.median(samples[name])
            cell = f"{speed:.0f}" if speed >= 20 else f"{speed:.1f}"
            ours = samples.get(f"wkv beside {name}", samples["wkv"])
            if name != "wkv" and ours:
                cell += f": {spread(ratios(samples[name], ours))}"
            cells.append(cell)
    return "| " + " | ".join(cells) + " |"


def memory(contender: Contender | None) -> str:
    return f"{contender.peak / 1e9:.1f} GB" if contender and contender.peak else ""


def processor() -> str:
    """The processor's name as Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def versions() -> list[str]:
    """The heading of each column, with the version that is installed."""

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return ""

    return [f"`{n}` {version(n)}".strip() for n in ("wkv", "rwkv", "rwkv7-hf")] + [
        f"Llama, transformers {version('transformers')}"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns, no rwkv7-hf training: about two minutes")
    parser.add_argument("--shape", choices=contenders.SHAPES, default="191m", help="tiny is to try the bench itself")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    shape, start = contenders.SHAPES[arguments.shape], time.perf_counter()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bench = Bench(shape, arguments.quick, arguments.threads, progress)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(contenders.checkpoint, (shape, CACHE))
        bench.show(bench.machine() + "\n")
        bench.show(bench.operator() + "\n")
        bench.show("| " + " | ".join([f"tok/s, RWKV-7 {shape.name.upper()}, random weights", *versions()]) + " |")
        bench.show("|---|---|---|---|---|")
        dtypes = ["float32", "bfloat16"]
        for dtype in dtypes:
            bench.show("\n".join(bench.inference(dtype)))
        for dtype in dtypes[:1] if arguments.quick else dtypes:
            bench.show("\n".join(bench.training(dtype)))
    print(
        f"\nAfter the colon: how many times faster `wkv` is, median and range of the turns. Training: forward, loss "
        f"and backward, no optimizer. The run took {time.perf_counter() - start:.0f} s."
    )


if __name__ == "__main__":
    sys.exit(main())
