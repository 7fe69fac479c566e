"""The parts of a run of `bench.py`: which contenders meet, how often, at what lengths. Each prints a table row by row.

Letters: B batch, T tokens, H heads, K head size.
"""

import dataclasses
import random
import statistics

import bench_chart
import bench_tables as tables
from bench_process import Contender
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes, lengths, turns and opponents of a run.

    `training` holds T, dtypes, turns and opponents of each step, `lora` T and turns.
    """

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
    lora: tuple[int, int]


BOTH = tuple(tables.DTYPES)
FULL = Plan(
    shape=SHAPES["191m"],
    large=SHAPES["1.5b"],
    parts=("operator", "inference", "large", "context", "training", "lora", "generations"),
    opponents=("rwkv", "rwkv7-hf", "Llama"),
    operator=(512, 12),
    prompt=512,
    rounds=5,
    tokens=32,
    contexts=(0, 4096, 16384, 65536),
    training=((512, BOTH, 3, ("Llama", "rwkv7-hf")), (2048, BOTH, 3, ("Llama",)), (8192, BOTH[1:], 2, ("Llama",))),
    lora=(1024, 5),
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
    lora=(32, 2),
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
    """Prefill and decoding with both dtypes, all models alive at once, a batch of 8 against one row, and LoRA."""
    plan, names = bench.plan, ("wkv", "llama.cpp", *bench.plan.opponents)
    heading(bench, "tokens per second", plan.shape, names)
    for dtype in BOTH:
        group = bench.start(names, plan.shape, dtype)
        _compare_logits(bench, group, dtype)
        _prefill(bench, group, plan.shape, dtype, plan.rounds)
        _decode(bench, group, plan.shape, dtype, plan.rounds, plan.tokens)
        if dtype != "float32":
            _batch(bench, group)
            _adapted(bench, group)
        close(group)


def large(bench) -> None:
    """A larger model against llama.cpp, with few tokens."""
    names, shape = ("wkv", "llama.cpp"), bench.plan.large
    heading(bench, "tokens per second", shape, names)
    group = bench.start(names, shape, "bfloat16")
    _compare_logits(bench, group, "bfloat16")
    _decode(bench, group, shape, "bfloat16", 3, bench.plan.tokens // 4)
    _prefill(bench, group, shape, "bfloat16", 2)
    close(group)


def heading(bench, title: str, shape: Shape, names) -> None:
    bench.show("\n" + tables.heading(f"{title}, RWKV-7 {shape.name}", *map(tables.column, names)))


def close(group: dict) -> None:
    for contender in group.values():
        contender.close()


def random_ids(shape: Shape, count: int) -> list[int]:
    return random.Random(0).choices(range(1, shape.vocabulary), k=count)


def _compare_logits(bench, group: dict, dtype: str) -> None:
    """Say how far the logits of the others with our weights are from ours."""
    for contender in group.values():
        contender.wait()
    ids = random_ids(bench.plan.shape, 32)
    logits = {name: contender.call("logits", ids) for name, contender in group.items() if name != "Llama"}
    for name, theirs in logits.items():
        if theirs and logits["wkv"] and name != "wkv":
            worst = max(abs(x - y) for x, y in zip(theirs, logits["wkv"], strict=True))
            bench.note(f"logits {tables.DTYPES[dtype]}: wkv and {name} differ by {worst:.1e} at most")


def _prefill(bench, group: dict, shape: Shape, dtype: str, rounds: int) -> None:
    """One row; llama.cpp also in F16, and the faster of its two 16-bit types counts."""
    ids, others = random_ids(shape, bench.plan.prompt), {}
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
    close(others)


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
    dense, zeros = each.pop("dense"), group["wkv"].call("zeros", random_ids(shape, 64)) or ZEROS
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


def _adapted(bench, group: dict) -> None:
    """LoRA of rank 16 on all projections of the blocks, against the same model with its adapters disabled."""
    group["wkv"].call("adapt")
    calls = {active: (group["wkv"], "decode_adapted", active, bench.plan.tokens) for active in (True, False)}
    samples = bench.take_turns("LoRA", bench.plan.rounds, calls)
    cell = group["wkv"].problem
    if samples[True]:
        cell = f"{tables.speed(bench.plan.tokens, samples[True], None)}: {tables.ratio(samples[False], samples[True])}"
    title = "decode with LoRA (against disabled), batch 1, bf16"
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
    close(group)
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


def generations(bench) -> None:
    """RWKV-4, 5 and 6 at the size of the smallest models: prompt, decoding, training step."""
    plan, names = bench.plan, ("wkv", "rwkv", "native RWKV-4")
    bench.show("\n" + tables.heading("tokens per second, other generations", *map(tables.column, names)))
    for shape in other_generations(plan.shape):
        for dtype in BOTH:
            group = bench.start(names if shape.version == "4" else names[:2], shape, dtype)
            works = {
                f"prefill, {plan.prompt} tokens": ("prefill", random_ids(shape, plan.prompt), plan.prompt),
                "decode, batch 1": ("decode", plan.tokens, plan.tokens),
                f"training step, T = {plan.prompt}": ("train", random_ids(shape, plan.prompt), plan.prompt),
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
            close(group)
