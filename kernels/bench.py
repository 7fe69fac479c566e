"""`make bench`: our operator and model against the other implementations, in one run, as ratios with their spread.

Every contender lives in a process of its own and they take turns, A B C A B C, so that a change of the machine's speed
meets all of them. A ratio is ours over theirs within one turn; the tables give the median and, in brackets, the
smallest and largest. The tables go to standard output as markdown, progress to standard error; random weights, a build
of llama.cpp and the chart to a cache folder; nothing else is written.

    python kernels/bench.py                   # about fourteen minutes, and six more the first time
    python kernels/bench.py --quick           # a minute and a half, fewer turns and rows
    python kernels/bench.py --only context    # one part
    python kernels/bench.py --device cuda     # the operators on a GPU; nothing else then
    python kernels/bench.py --device cuda --op wkv7 --lengths 4096 --without plain loop    # a part of that
    python kernels/bench.py --device cuda --kernels    # time by kernel, beside what was predicted of each
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import bench_cuda
import bench_llama_cpp
import bench_parts as parts
import bench_tables as tables
import bench_training
import bench_weights
from bench_process import Absent, Contender
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "wkv-bench"
LLAMA_CPP = "llama.cpp"
# name: the distribution to install, the class that runs it
MODELS = {
    "wkv": ("wkv", "bench_contenders.Wkv"),
    "rwkv": ("rwkv", "bench_contenders.Rwkv"),
    "rwkv7-hf": ("rwkv7-hf", "bench_contenders.Rwkv7Hf"),
    "Llama": ("transformers", "bench_contenders.Llama"),
    "native RWKV-4": ("transformers", "bench_contenders.NativeRwkv4"),
}
# In this order: an interrupted run leaves the comparisons with the other programs.
PARTS = {
    "operator": parts.operator,
    "inference": parts.inference,
    "large": parts.large,
    "context": parts.context,
    "training": bench_training.training,
    "lora": bench_training.lora,
    "generations": parts.generations,
}
LEGEND = """\
A number is the median of the turns; after a colon, how many times faster `wkv` is, median and range of the turns. A
percentage is the share of what the machine allowed in the same turns: for decoding, the time to read every weight that
a token needs; for prefill, that of the products between embedding and head at the rate of a large square one. Weights
are random, made so that 86 % of the activations relu(x)^2 of the feed-forward (FFN) are zero, as in trained models;
rows with none set `wkv` to that, the others do the same work in both. Beside bf16, llama.cpp prefills in the faster of
its BF16 and F16. A training step is forward, loss and backward, without the optimizer.
"""


class Bench:
    """What the parts of a run share: shapes, lengths, processes, turns, and where text goes."""

    def __init__(self, plan: parts.Plan, threads: int, chart: Path, progress: Progress):
        self.plan, self.threads, self.chart, self.progress = plan, threads, chart, progress
        self.task = progress.add_task("loading", total=None)
        self.machine = Contender("torch", "bench_contenders.Machine")

    def say(self, text: str) -> None:
        """Progress."""
        self.progress.update(self.task, description=text)
        if not self.progress.console.is_terminal:
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Something to check, to standard error, which stays on the screen."""
        self.progress.console.print(text, highlight=False) if self.progress.console.is_terminal else self.say(text)

    def show(self, text: str) -> None:
        """A finished row or table to standard output, so that an interrupted run leaves what it measured."""
        self.progress.stop()
        print(text, flush=True)
        self.progress.start()

    def take_turns(self, label: str, rounds: int, calls: dict, warm: bool = True) -> dict[str, list]:
        """Results by name and turn, after a warm-up; `calls` holds name -> (contender, method, arguments)."""
        samples = {name: [] for name in calls}
        self.say(f"{label}: loading")
        for contender, *_ in calls.values():
            contender.wait()
        for turn in range(-1 if warm else 0, rounds):
            for name, (contender, *call) in calls.items():
                self.say(f"{label}: {name}, {'warm-up' if turn < 0 else f'turn {turn + 1} of {rounds}'}")
                result = contender.call(*call)
                if result is not None and turn >= 0:
                    samples[name].append(result)
        return samples

    def start(self, names: Iterable[str], shape: bench_weights.Shape, dtype: str) -> dict[str, Contender | Absent]:
        """The processes of some models, on the weights of a shape, which are written unless they are there."""
        files = bench_weights.checkpoint_paths(shape, CACHE)
        if not bench_weights.is_written(shape, CACHE):
            self.say(f"writing the weights of {shape.name} to {CACHE} (once)")
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                pool.apply(bench_weights.write_checkpoint, (shape, CACHE))
        return {
            name: self._llama_cpp(shape, files[1], dtype)
            if name == LLAMA_CPP
            else Contender(*MODELS[name], shape, *files, dtype)
            for name in names
        }

    def _llama_cpp(self, shape: bench_weights.Shape, folder: Path, dtype: str) -> Contender | Absent:
        """The process of llama.cpp on the same weights, converted."""
        try:
            bench_llama_cpp.build(CACHE, self.say)
            bench_llama_cpp.convert(CACHE, folder, dtype, shape.vocabulary, self.say)
        except bench_llama_cpp.MissingError as error:
            return Absent(str(error))
        gguf = bench_llama_cpp.gguf_path(folder, dtype)
        return Contender(
            "numpy", "bench_llama_cpp.LlamaCpp", CACHE, gguf, shape.vocabulary, self.threads, method="spawn"
        )


def machine_line(bench: Bench) -> str:
    """Bandwidth and matrix rate before all parts."""
    machine = bench.machine
    calls = {str(threads): (machine, "read", threads) for threads in sorted({1, bench.threads})}
    calls |= {dtype: (machine, "product", dtype) for dtype in tables.DTYPES}
    best = {name: min(turns) for name, turns in bench.take_turns("machine", 4, calls).items()}
    reads = [f"{2**30 / best[str(n)] / 1e9:.0f} GB/s with {n}" for n in sorted({1, bench.threads})]
    rates = [f"{2 * 4096**3 / best[dtype] / 1e9:.0f} ({short})" for dtype, short in tables.DTYPES.items()]
    return (
        f"{tables.processor()}, {bench.threads} threads, torch {metadata.version('torch')}: reads "
        f"{', '.join(reads)}, multiplies matrices at {' and '.join(rates)} GFLOP/s.\n"
    )


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer turns and rows: a minute and a half")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--shape", choices=parts.PLANS, default="191m", help="tiny is to try the bench out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: the operators, on a GPU")
    parser.add_argument("--chart", type=Path, default=CACHE / "decode_context.png", help="PNG that `context` draws")
    bench_cuda.add_arguments(parser)
    given = parser.parse_args()
    if given.threads < 1:
        parser.error(f"argument --threads: must be at least 1, got {given.threads}")
    bench_cuda.check_arguments(parser, given)
    if given.chart.suffix != ".png":
        parser.error(f"argument --chart: must end in .png, got {given.chart}")
    CACHE.mkdir(parents=True, exist_ok=True)
    if not given.chart.parent.is_dir():
        parser.error(f"argument --chart: no such folder: {given.chart.parent}")
    return given


def main() -> None:
    given, start = arguments(), time.perf_counter()
    if given.device == "cuda":
        sys.exit(bench_cuda.main(given))
    # Read by the processes of the contenders.
    os.environ.update(OMP_NUM_THREADS=str(given.threads), TRANSFORMERS_VERBOSITY="error", TQDM_DISABLE="1")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bench = Bench(parts.PLANS[given.shape][given.quick], given.threads, given.chart, progress)
        bench.show(machine_line(bench))
        bench.show(LEGEND)
        for name in given.only or bench.plan.parts:
            began = time.perf_counter()
            PARTS[name](bench)
            bench.note(f"part {name}: {time.perf_counter() - began:.0f} s")
    print(f"\nThis run took {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
