"""The parts of a run of `bench.py` about training steps, of all weights and of adapters.

Letters: T tokens.
"""

import bench_tables as tables
import psutil
from bench_parts import BOTH, close, heading, random_ids
from bench_process import Absent

# Free memory without which a training step of so many tokens is not asked of a model.
TRAINING_MEMORY = {("rwkv7-hf", 512): 20e9, ("Llama", 8192): 16e9}


def training(bench) -> None:
    """Forward, loss and backward without an optimizer, and the peak memory of the processes."""
    steps = bench.plan.training
    names = ("wkv", *dict.fromkeys(name for *_, opponents in steps for name in opponents))
    heading(bench, "training step, tokens per second and peak memory", bench.plan.shape, names)
    for dtype in BOTH:
        group = bench.start(names, bench.plan.shape, dtype)
        warm = True
        for T, dtypes, rounds, opponents in steps:
            if dtype not in dtypes:
                continue
            taking = {name: group[name] for name in ("wkv", *opponents)}
            for name in set(group) - set(taking):
                group.pop(name).close()
            _training_row(bench, names, taking, T, dtype, rounds, warm)
            warm = False
        close(group)


def _training_row(bench, names, group: dict, T: int, dtype: str, rounds: int, warm: bool) -> None:
    for name in list(group):
        need = TRAINING_MEMORY.get((name, T), 0)
        if psutil.virtual_memory().available < need:
            group[name] = Absent(f"needs {need / 1e9:.0f} GB of free memory")
    calls = {name: (contender, "train", random_ids(bench.plan.shape, T)) for name, contender in group.items()}
    samples = bench.take_turns(f"training step {tables.DTYPES[dtype]}, T = {T}", rounds, calls, warm)
    cells = []
    for name in names:
        if name not in group or group[name].problem or not samples[name]:
            cells.append(group[name].problem if name in group else "-")
            continue
        speed = tables.speed(T, samples[name], samples["wkv"] if name != "wkv" else None)
        cells.append(f"{speed}; {tables.size(group[name].peak)}")
    bench.show(tables.line(f"T = {T}, {tables.DTYPES[dtype]}", *cells))


def lora(bench) -> None:
    """The step of adapters on every matrix of the blocks, the rest frozen, in bfloat16."""
    (T, rounds), names = bench.plan.lora, ("wkv", "Llama")
    group = bench.start(names, bench.plan.shape, "bfloat16")
    counts = [contender.call("adapt") for contender in group.values()]
    title = "LoRA training step, rank 16, tokens per second and peak memory"
    heading(bench, title, bench.plan.shape, names)
    _training_row(bench, names, group, T, "bfloat16", rounds, warm=True)
    bench.show(
        tables.line("adapters' parameters", *(f"{count / 1e6:.1f} million" if count else "-" for count in counts))
    )
    close(group)
