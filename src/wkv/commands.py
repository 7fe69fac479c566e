"""`wkv generate`, `wkv chat` and `wkv demo`: text to standard output, what it took to standard error."""

import subprocess
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList

from .chat import Chat, TextStream
from .demo import demo_model_path
from .information import kernel, peak_memory
from .sampling import generate_arguments

# What `wkv demo` samples: a cautious setting, and a seed so that it can be repeated.
TEMPERATURE, TOP_P, SEED = 1.0, 0.5, 1
PROMPT = "Mr. Speaker, Mr. Vice President, Members of Congress, my fellow Americans:"
# Runs the command where `import wkv_kernels` fails, as it does where nothing was compiled.
WITHOUT_KERNELS = "import sys; sys.modules['wkv_kernels'] = None; from wkv.cli import main; sys.exit(main())"


def load(folder: Path, dtype: str, threads: int | None):
    """The model and the tokenizer of a folder; ValueError or OSError says what is wrong with it."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a folder that `wkv convert` or save_pretrained wrote is needed")
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: has no config.json; a folder that `wkv convert` or save_pretrained wrote is needed"
        )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        raise ValueError(f"{folder}: has no tokenizer; `wkv tokenizer build DIR` writes the World tokenizer's files")
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)
    # The libraries that read the files raise many types, bare Exception among them; all mean that the folder is bad.
    except Exception as error:
        raise ValueError(f"{folder}: {error}") from error


def write(text: str) -> None:
    print(text, end="", flush=True)


def report(stream: TextStream) -> str:
    """Speeds, kernel and memory in one line."""
    parts = [f"prompt {stream.prompt_tokens} tokens, {stream.prompt_tokens / stream.prefill_seconds:.0f} tok/s"]
    if stream.tokens > 1:
        parts.append(f"then {stream.tokens} tokens, {(stream.tokens - 1) / stream.decode_seconds:.0f} tok/s")
    parts.append(f"kernel {kernel()}, threads {torch.get_num_threads()}")
    parts.append(f"peak memory {peak_memory() / 1e6:.0f} MB")
    return "; ".join(parts)


def generate_text(
    folder: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    settings: dict,
    stop: list[str],
    seed: int | None,
    dtype: str,
    threads: int | None,
) -> str:
    """Stream `prompt` and a continuation, and return both; settings are those of `wkv.sampling.RwkvSampling`."""
    model, tokenizer = load(folder, dtype, threads)
    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if not length:
        raise ValueError("the prompt is empty; give some text to continue")
    if seed is not None:
        torch.manual_seed(seed)
    written = []

    def show(text: str) -> None:
        written.append(text)
        write(text)

    stream = TextStream(tokenizer, show, stop)
    show(prompt)
    model.generate(
        **inputs,
        streamer=stream,
        stopping_criteria=StoppingCriteriaList([stream]),
        max_new_tokens=max_new_tokens,
        **generate_arguments(tokenizer, length, temperature, top_p, **settings),
    )
    show("\n")
    print(report(stream), file=sys.stderr)
    return "".join(written)


def converse(
    folder: Path,
    system: str,
    max_new_tokens: int,
    settings: dict,
    seed: int | None,
    dtype: str,
    threads: int | None,
) -> None:
    """Answer standard input line by line until it ends or says /exit."""
    model, tokenizer = load(folder, dtype, threads)
    if seed is not None:
        torch.manual_seed(seed)
    talk = Chat(model, tokenizer, system, **settings)
    while True:
        try:
            message = input("User: ").strip()
        except EOFError:
            write("\n")
            return
        if message == "/exit":
            return
        if message == "/reset":
            talk.reset()
            write("(forgotten)\n")
        elif message:
            write("Assistant:")
            stream = talk.reply(message, write, max_new_tokens)
            write("\n\n")
            print(report(stream), file=sys.stderr)


def demonstrate(max_new_tokens: int, threads: int | None) -> int:
    """Let the shipped model write here, then once more in a process without the compiled kernels; 1 if they differ."""
    folder = demo_model_path()
    if not folder.is_dir():
        raise ValueError(f"{folder}: the demo model is not part of this build; `wkv generate FOLDER` runs any other")
    threads = threads or torch.get_num_threads()
    print(f"RWKV-7 from {folder}, through AutoModelForCausalLM and AutoTokenizer, continues:\n", file=sys.stderr)
    settings = {"presence": 0.0, "frequency": 0.0}
    text = generate_text(folder, PROMPT, max_new_tokens, TEMPERATURE, TOP_P, settings, [], SEED, "float32", threads)
    print("\nThe same once more in plain PyTorch, without the compiled kernels ...", file=sys.stderr)
    options = {
        "--max-new-tokens": max_new_tokens,
        "--temperature": TEMPERATURE,
        "--top-p": TOP_P,
        "--presence-penalty": 0,
        "--frequency-penalty": 0,
        "--seed": SEED,
        "--dtype": "float32",
        "--threads": threads,
    }
    command = [sys.executable, "-c", WITHOUT_KERNELS, "generate", str(folder), PROMPT]
    command += [str(part) for pair in options.items() for part in pair]
    plain = subprocess.run(command, capture_output=True, text=True)
    if plain.returncode:
        raise ValueError(f"plain PyTorch failed: {plain.stderr.strip()}")
    print(plain.stderr.strip().splitlines()[-1], file=sys.stderr)
    same = plain.stdout == text
    print(
        "Both wrote the same text." if same else f"They differ; plain PyTorch wrote:\n{plain.stdout}", file=sys.stderr
    )
    return 0 if same else 1
