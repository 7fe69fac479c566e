"""The parts of a run of `bench.py`: which contenders meet, how often, at what lengths. Each prints a table row by row.

Letters: B batch, T tokens, H heads, K head size.
"""

import dataclasses
import random
import statistics

import bench_chart
import bench_tables as tables
import psutil
from bench_process import Absent, Contender
from bench_weights import SHAPES, ZEROS, Shape, other_generations

FORMS = {
    "compiled": "compiled (`wkv_kernels`)",
    "scan": "scan, plain PyTorch (`scan_{op}`)",
    "chunked": "chunked, plain PyTorch (`chunk_{op}`)",
    "naive chunks": "naive chunks, plain PyTorch",
    "loop": "loop over tokens (`naive_recurrent_{op}`)",
}
# Nearly none of the feed-forward activations zero, instead of the share ZEROS.
DENSE = 0.001
# Free memory without which a training step of so many tokens is not asked of a model.
TRAINING_MEMORY = {("rwkv7-hf", 512): 20e9, ("Llama", 8192): 16e9}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes, lengths, turns and opponents of a run; `training` holds T, dtypes, turns and opponents of each step."""

    shape: Shape
    large: Shape
    parts: tuple[str, ...]
    opponents: tuple[str, ...]
    operator: tuple[int, int]
    prompt: int
    rounds: int
    tokens: int
    contexts: tuple[int, ...]
    training: tuple[tuple[int, tuple[str, ...], int, tuple[str, ...]], ...]


BOTH = tuple(tables.DTYPES)
FULL = Plan(
    shape=SHAPES["191m"],
    large=SHAPES["1.5b"],
    parts=("operator", "inference", "large", "context", "training", "generations"),
    opponents=("rwkv", "rwkv7-hf", "Llama"),
    operator=(512, 12),
    prompt=512,
    rounds=5,
    tokens=32,
    contexts=(0, 4096, 16384, 65536),
    training=((512, BOTH, 3, ("Llama", "rwkv7-hf")), (2048, BOTH, 3, ("Llama",)), (8192, BOTH[1:], 2, ("Llama",))),
)
QUICK = dataclasses.replace(
    FULL,
    parts=("operator", "inference", "context", "training"),
    opponents=("rwkv", "Llama"),
    rounds=3,
    tokens=16,
    contexts=(0, 4096),
    training=((512, BOTH[1:], 2, ("Llama",)),),
)
TINY = dataclasses.replace(
    FULL,
    shape=SHAPES["tiny"],
    large=SHAPES["tiny"],
    operator=(64, 2),
    prompt=32,
    rounds=2,
    tokens=4,
    contexts=(0, 64, 2048),
    training=((32, BOTH, 2, ("Llama", "rwkv7-hf")), (64, BOTH[1:], 1, ("Llama",))),
)
# By shape: the plan of a full and of a quick run.
PLANS = {"191m": (FULL, QUICK), "tiny": (TINY, TINY)}


def operator(bench) -> None:
    """Forward and backward of the operators alone, all forms of one in one process."""
    T, H = bench.plan.operator
    rounds = 2 * bench.plan.rounds - 1
    for op in ("wkv4", "wkv6", "wkv7"):
        process = Contender("wkv", "bench_operator.Operator", op, T, H, 64)
        forms = process.call("names") or []
        title = f"`{op}`, forward + backward, B=1 T={T} H={H} K=64, fp32"
        columns = "ms", "ns a token and head", "compiled is faster by", "output differs from the loop by"
        bench.show("\n" + tables.heading(title, *columns))
        samples = bench.take_turns(f"operator {op}", rounds, {form: (process, "step", form) for form in forms})
        errors = {form: process.call("error", form) for form in forms}
        process.close()
        if process.problem:
            bench.show(tables.line(FORMS["compiled"], process.problem, "", "", ""))
            continue
        for form in forms:
            seconds = statistics.median(samples[form])
            ratio = "" if form == "compiled" else tables.ratio(samples[form], samples["compiled"])
            times = tables.number(1e3 * seconds), tables.number(1e9 * seconds / (T * H))
            error = "" if form == "loop" else f"{errors[form]:.0e}"
            bench.show(tables.line(FORMS[form].format(op=op), *times, ratio, error))


def inference(bench) -> None:
    """Prefill and decoding with both dtypes, all models alive at once, and a batch of 8 against one row."""
    plan, names = bench.plan, ("wkv", "llama.cpp", *bench.plan.opponents)
    _heading(bench, "tokens per second", plan.shape, names)
    for dtype in BOTH:
        group = bench.start(names, plan.shape, dtype)
        _compare_logits(bench, group, dtype)
        _prefill(bench, group, plan.shape, dtype, plan.rounds)
        _decode(bench, group, plan.shape, dtype, plan.rounds, plan.tokens)
        if dtype != "float32":
            _batch(bench, group)
        _close(group)


def large(bench) -> None:
    """A larger model against llama.cpp, with few tokens."""
    names, shape = ("wkv", "llama.cpp"), bench.plan.large
    _heading(bench, "tokens per second", shape, names)
    group = bench.start(names, shape, "bfloat16")
    _compare_logits(bench, group, "bfloat16")
    _decode(bench, group, shape, "bfloat16", 3, bench.plan.tokens // 4)
    _prefill(bench, group, shape, "bfloat16", 2)
    _close(group)


def _heading(bench, title: str, shape: Shape, names) -> None:
    bench.show("\n" + tables.heading(f"{title}, RWKV-7 {shape.name}", *map(tables.column, names)))


def _close(group: dict) -> None:
    for contender in group.values():
        contender.close()


def _ids(shape: Shape, count: int) -> list[int]:
    return random.Random(0).choices(range(1, shape.vocabulary), k=count)


def _compare_logits(bench, group: dict, dtype: str) -> None:
    """Say how far the logits of the others with our weights are from ours."""
    for contender in group.values():
        contender.wait()
    ids = _ids(bench.plan.shape, 32)
    logits = {name: contender.call("logits", ids) for name, contender in group.items() if name != "Llama"}
    for name, theirs in logits.items():
        if theirs and logits["wkv"] and name != "wkv":
            worst = max(abs(x - y) for x, y in zip(theirs, logits["wkv"], strict=True))
            bench.note(f"logits {tables.DTYPES[dtype]}: wkv and {name} differ by {worst:.1e} at most")


def _prefill(bench, group: dict, shape: Shape, dtype: str, rounds: int) -> None:
    """One row; llama.cpp also in F16, and the faster of its two 16-bit types counts."""
    ids, others = _ids(shape, bench.plan.prompt), {}
    if dtype != "float32" and shape.official:
        others = {"llama.cpp F16": bench.start(["llama.cpp"], shape, "float16")["llama.cpp"]}
    calls = {name: (contender, "prefill", ids) for name, contender in (group | others).items()}
    calls["limit"] = (bench.machine, "product", dtype)
    samples = bench.take_turns(f"prefill {tables.DTYPES[dtype]}", rounds, calls)
    limit = [seconds * shape.blocks * len(ids) / 4096**3 for seconds in samples.pop("limit")]
    if others and samples["llama.cpp"]:
        best = min("llama.cpp", *others, key=lambda name: statistics.median(samples[name]))
        bench.note(f"prefill: {best} is the faster of the two")
        samples["llama.cpp"] = samples[best]
    _row(bench, f"prefill, {len(ids)} tokens, {tables.DTYPES[dtype]}", group, samples, len(ids), limit)
    _close(others)


def _decode(bench, group: dict, shape: Shape, dtype: str, rounds: int, tokens: int) -> None:
    """Two rows: none of the feed-forward activations zero, and as many as in trained models."""
    short = tables.DTYPES[dtype]
    counts = {name: max(1, tokens // 4) if name == "rwkv7-hf" else tokens for name in group}
    calls = {name: (contender, "decode", counts[name]) for name, contender in group.items()}
    calls["dense"] = (group["wkv"], "decode_with", DENSE, "decode", tokens)
    calls["limit"] = (bench.machine, "read", bench.threads)
    samples = bench.take_turns(f"decode {short}", rounds, calls)
    reads = samples.pop("limit")
    each = {name: [seconds / counts.get(name, tokens) for seconds in turns] for name, turns in samples.items()}
    dense, zeros = each.pop("dense"), group["wkv"].call("zeros", _ids(shape, 64)) or ZEROS
    for share, ours in ((0, dense), (zeros, each["wkv"])):
        weights = shape.blocks + shape.head - share * shape.value
        limit = [seconds * weights * (4 if dtype == "float32" else 2) / 2**30 for seconds in reads]
        what = f"{share:.0%} of the FFN zero" if share else "none of the FFN zero"
        more = f"; {tables.ratio(dense, ours)} the row above" if share and ours else ""
        _row(bench, f"decode, batch 1, {short}, {what}", group, each | {"wkv": ours}, 1, limit, more)


def _batch(bench, group: dict) -> None:
    """8 rows decoded at once against 8 times one row, nothing zero and as in trained models."""
    count = bench.plan.tokens // 2
    for share, what in ((DENSE, "none"), (ZEROS, f"{ZEROS:.0%}")):
        call = group["wkv"], "decode_with", share, "decode_rows"
        calls = {rows: (*call, rows, count) for rows in (8, 1)}
        samples = bench.take_turns("batch", bench.plan.rounds, calls)
        cell = group["wkv"].problem
        if samples[8]:
            one_by_one = [8 * seconds for seconds in samples[1]]
            cell = f"{tables.speed(8 * count, samples[8], None)}: {tables.ratio(one_by_one, samples[8])}"
        title = f"decode, batch 8 (against 8 x batch 1), bf16, {what} of the FFN zero"
        bench.show(tables.line(title, cell, *["-"] * (len(group) - 1)))


def _row(bench, title: str, group: dict, samples: dict, tokens: int, limit: list[float], more: str = "") -> None:
    """Tokens per second; ours with its share of the limit and `more`, the others with a ratio, or why there is none."""
    cells = [contender.problem for contender in group.values()]
    for i, (name, contender) in enumerate(group.items()):
        if samples[name] and not contender.problem:
            ours = samples["wkv"] if name != "wkv" else None
            cells[i] = tables.speed(tokens, samples[name], ours)
            cells[i] += "" if ours else tables.share(limit, samples["wkv"]) + more
    bench.show(tables.line(title, *cells))


def context(bench) -> None:
    """Decoding and memory after contexts of several lengths, and the chart."""
    group = bench.start(("wkv", "Llama"), bench.plan.shape, "bfloat16")
    counts = {"wkv": bench.plan.tokens, "Llama": max(1, bench.plan.tokens // 8)}
    calls = {
        (name, length): (contender, "decode_after", length, counts[name])
        for length in bench.plan.contexts
        for name, contender in group.items()
    }
    samples = bench.take_turns("context", max(2, bench.plan.rounds // 2 + 1), calls)
    _close(group)
    titles = (title for name in group for title in (tables.column(name), "its cache; its process"))
    bench.show("\n" + tables.heading(f"decode after a context, RWKV-7 {bench.plan.shape.name}, bf16", *titles))
    points = {}
    for length in bench.plan.contexts:
        cells, each = [], {}
        for name, contender in group.items():
            turns = samples[name, length]
            if contender.problem or not turns:
                cells += [contender.problem, ""]
                continue
            each[name] = [seconds / counts[name] for seconds, _, _ in turns]
            _, size, resident = turns[-1]
            points[name, length] = (1 / statistics.median(each[name]), resident)
            cells.append(tables.speed(1, each[name], each.get("wkv") if name != "wkv" else None))
            cells.append(f"{tables.size(size)}; {tables.size(resident)}")
        if "wkv" in each:
            first = [seconds / counts["wkv"] for seconds, _, _ in samples["wkv", bench.plan.contexts[0]]]
            cells[0] += f", {tables.ratio(first, each['wkv'])} of that after 0" if length else ""
        bench.show(tables.line(f"{length} tokens", *cells))
    bench.show(
        "\nMemory: the cache (state, or keys and values), then all that is resident of the process. Llama's cache is "
        "filled\nwith random keys and values, since computing them would take many minutes; `wkv` has read its context."
    )
    if len(points) == len(calls):
        bench_chart.draw(bench.chart, bench.plan.contexts, points)
        bench.note(f"chart: {bench.chart}")


def training(bench) -> None:
    """Forward, loss and backward without an optimizer, and the peak memory of the processes."""
    steps = bench.plan.training
    names = ("wkv", *dict.fromkeys(name for *_, opponents in steps for name in opponents))
    _heading(bench, "training step, tokens per second and peak memory", bench.plan.shape, names)
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
        _close(group)


def _training_row(bench, names, group: dict, T: int, dtype: str, rounds: int, warm: bool) -> None:
    for name in list(group):
        need = TRAINING_MEMORY.get((name, T), 0)
        if psutil.virtual_memory().available < need:
            group[name] = Absent(f"needs {need / 1e9:.0f} GB of free memory")
    calls = {name: (contender, "train", _ids(bench.plan.shape, T)) for name, contender in group.items()}
    samples = bench.take_turns(f"training step {tables.DTYPES[dtype]}, T = {T}", rounds, calls, warm)
    cells = []
    for name in names:
        if name not in group or group[name].problem or not samples[name]:
            cells.append(group[name].problem if name in group else "-")
            continue
        speed = tables.speed(T, samples[name], samples["wkv"] if name != "wkv" else None)
        cells.append(f"{speed}; {tables.size(group[name].peak)}")
    bench.show(tables.line(f"T = {T}, {tables.DTYPES[dtype]}", *cells))


def generations(bench) -> None:
    """RWKV-4, 5 and 6 at the size of the smallest models: prompt, decoding, training step."""
    plan, names = bench.plan, ("wkv", "rwkv", "native RWKV-4")
    bench.show("\n" + tables.heading("tokens per second, other generations", *map(tables.column, names)))
    for shape in other_generations(plan.shape):
        for dtype in BOTH:
            group = bench.start(names if shape.version == "4" else names[:2], shape, dtype)
            works = {
                f"prefill, {plan.prompt} tokens": ("prefill", _ids(shape, plan.prompt), plan.prompt),
                "decode, batch 1": ("decode", plan.tokens, plan.tokens),
                f"training step, T = {plan.prompt}": ("train", _ids(shape, plan.prompt), plan.prompt),
            }
            for title, (method, argument, tokens) in works.items():
                able = {name: contender for name, contender in group.items() if (name, method) != ("rwkv", "train")}
                calls = {name: (contender, method, argument) for name, contender in able.items()}
                samples = bench.take_turns(f"RWKV-{shape.version} {title}", max(2, plan.rounds // 2 + 1), calls)
                cells = {name: "-" for name in names}
                for name, contender in able.items():
                    ours = samples["wkv"] if name != "wkv" else None
                    cells[name] = contender.problem or tables.speed(tokens, samples[name], ours)
                short = tables.DTYPES[dtype]
                bench.show(tables.line(f"RWKV-{shape.version} {shape.name}, {title}, {short}", *cells.values()))
            _close(group)
