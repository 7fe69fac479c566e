"""One model on its tasks: found among earlier results, or run by lm-eval, with what that does not record."""

import contextlib
import dataclasses
import gc
import glob
import hashlib
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from lm_eval import evaluator, simple_evaluate
from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker
from lm_eval.utils import handle_non_serializable, sanitize_model_name

from .eval_command import Settings
from .eval_models import Stopwatch, Subject, kept_answers, load_model
from .eval_selection import TaskChoice, documents_sha256, tasks_sha256
from .information import kernel, peak_memory
from .results import read_results, without_paths_in_line, write_results

PACKAGES = ("wkv", "torch", "transformers", "lm_eval", "datasets")
# Resampling for the errors of perplexities; more digits than are shown would need lm-eval's hundred times more.
BOOTSTRAPS = 1000
# It asks git about the working directory, which need not be ours, and lets git complain.
evaluator.get_git_commit_hash = lambda: None


def run(subject: Subject, settings: Settings, choice: TaskChoice, output: Path) -> Path:
    """The results file of a model: one with the same weights, settings and tasks in `output`, or a new one."""
    loaded = choice.load(subject.arguments["pretrained"], subject.tokenizer)
    asked = dataclasses.asdict(settings) | {"tasks": sorted(set(settings.tasks))}
    wanted = subject.digests | {
        "model": subject.name,
        "settings": json.loads(json.dumps(asked)),
        "programs": {name: metadata.version(name) for name in ("wkv", "lm_eval")},
        "tasks_sha256": tasks_sha256(loaded),
        "documents_sha256": documents_sha256(loaded, settings.num_fewshot),
    }
    if finished := _finished(output, wanted):
        print(f"{subject.name}: {finished} has the results with these settings; not run again", file=sys.stderr)
        return finished
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    cache = output / f".{sanitize_model_name(subject.name)}-{digest}"
    try:
        results = _run(subject, settings, choice, loaded, cache)
    except BaseException:
        if not kept_answers(subject, cache):
            _remove(cache)
        raise
    results["wkv"] |= wanted | subject.as_downloaded().digests
    path = write_results(output, results)
    _remove(cache)
    return path


def _remove(cache: Path) -> None:
    """The cache, under whatever ending lm-eval has given its name."""
    for part in cache.parent.glob(glob.escape(cache.name) + "*"):
        part.unlink()


def _finished(output: Path, wanted: dict) -> Path | None:
    for path in sorted(output.glob("results_*.json"), reverse=True):
        try:
            facts = read_results(path).get("wkv", {})
        except ValueError as error:
            print(f"passed over: {error}", file=sys.stderr)
            continue
        if wanted["model_sha256"] and all(facts.get(key) == value for key, value in wanted.items()):
            return path
    return None


def _run(subject: Subject, settings: Settings, choice: TaskChoice, loaded: list, cache: Path) -> dict:
    """lm-eval's results, with "wkv" beside them."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    kept = kept_answers(subject, cache)
    print(f"{subject.name}: " + (f"goes on after {kept} answers" if kept else "begins"), file=sys.stderr)
    # First, so that an interruption there does not leave a run without its seconds.
    memory = _memory_by_context(subject, settings)
    _reset_peak_memory(settings.device)
    model, use_cache = load_model(
        subject, settings.dtype, settings.device, settings.batch_size, settings.leading_token, cache
    )
    watch = Stopwatch(model)
    results = _evaluate(subject, settings, choice, loaded, model, use_cache)
    results["wkv"] = _facts(subject, settings, model, watch) | {"memory_by_context": memory, "resumed": kept > 0}
    del model, watch
    gc.collect()
    return json.loads(json.dumps(results, default=handle_non_serializable))


def _evaluate(subject: Subject, settings: Settings, choice: TaskChoice, loaded: list, model, use_cache) -> dict:
    """What `lm_eval run` would write, without what tells of this machine."""
    tracker = GeneralConfigTracker()
    tracker.log_experiment_args(subject.backend, {"model": subject.name}, None, None, True)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    results = simple_evaluate(
        model=model,
        tasks=loaded,
        task_manager=choice.manager,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        use_cache=use_cache,
        bootstrap_iters=BOOTSTRAPS,
        log_samples=False,
        apply_chat_template=settings.apply_chat_template,
        **({} if settings.seed is None else dict.fromkeys(seeds, settings.seed)),
    )
    if settings.apply_chat_template:
        tracker.chat_template = model.chat_template(True)
    tracker.log_end_time()
    results |= dataclasses.asdict(tracker)
    results["config"] |= {
        "model": subject.backend,
        "model_args": {**subject.arguments, "dtype": settings.dtype},
        "batch_size": settings.batch_size,
        "device": settings.device,
        "use_cache": None,
    }
    # The names of the machine, of its packages and folders, and the commit of whatever stands in this folder.
    for key in ("pretty_env_info", "git_hash", "upper_git_hash"):
        results.pop(key)
    return results


def _facts(subject: Subject, settings: Settings, model, watch: Stopwatch) -> dict:
    """What lm-eval does not record."""
    on_gpu = torch.device(settings.device).type == "cuda"
    return {
        "model": subject.name,
        "model_type": subject.model_type,
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "tokens_asked": model.tokens_asked,
        "tokens_computed": model.tokens_computed,
        "seconds": watch.seconds,
        "tokens_per_second": model.tokens_asked / watch.seconds if watch.seconds else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(settings.device) if on_gpu else int(peak_memory()),
        "kernel": kernel() if subject.backend == "wkv" else "plain PyTorch",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "command": without_paths_in_line(["wkv", *sys.argv[1:]]),
    }


def _memory_by_context(subject: Subject, settings: Settings) -> dict:
    """`eval_memory` in a process of its own, where nothing else takes memory."""
    if not settings.context_lengths:
        return {}
    print(f"{subject.name}: memory of up to {max(settings.context_lengths):,} tokens", file=sys.stderr)
    request = {
        **subject.arguments,
        "dtype": subject.dtype(settings.dtype),
        "device": settings.device,
        "threads": settings.threads,
        "lengths": settings.context_lengths,
    }
    line = [sys.executable, "-m", f"{__package__}.eval_memory", json.dumps(request)]
    measured = subprocess.run(line, capture_output=True, text=True)
    if measured.returncode:
        # A process that was killed, for its memory perhaps, says nothing.
        lines = measured.stderr.strip().splitlines() or [f"its process ended with exit code {measured.returncode}"]
        print(f"{subject.name}: memory could not be measured: {lines[-1]}", file=sys.stderr)
        return {}
    return json.loads(measured.stdout)


def _reset_peak_memory(device: str) -> None:
    """Let the peak begin anew for the next model: of a CUDA device, or where the system can, Linux."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
