"""`wkv generate`, `wkv chat` and `wkv demo`: text to standard output, everything else to standard error."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList

from .chat import Chat, TextStream, encode_prompt
from .demo import demo_model_path
from .information import kernel, peak_memory
from .presets import PRESETS, Preset
from .sampling import generate_arguments
from .states import continue_from, load_state, read_text, save_state

# What `wkv demo` samples: a cautious setting, and a seed so that it can be repeated.
DEMO = PRESETS["text"]._replace(top_p=0.5, presence=0.0, frequency=0.0)
SEED = 1
PROMPT = "Mr. Speaker, Mr. Vice President, Members of Congress, my fellow Americans:"
COMMANDS = """/reset         forget the conversation
/retry         give the last answer again
/save FILE     write the state of the conversation to a file
/load FILE     go on from the state in a file
/help          this list
/exit          end; so does the end of the input
"""
# Runs the command where `import wkv_kernels` fails, as it does where nothing was compiled.
WITHOUT_KERNELS = "import sys; sys.modules['wkv_kernels'] = None; from wkv.cli import main; sys.exit(main())"


def load(folder: Path, dtype: str, threads: int | None):
    """The model and the tokenizer of a folder; ValueError or OSError says what is wrong with it."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a folder that `wkv convert` or save_pretrained wrote is needed")
    # The second is that of a PEFT adapter, which names its base model.
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"{folder}: has no config.json; a folder that `wkv convert` or save_pretrained wrote is needed"
        )
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        raise ValueError(f"{folder}: has no tokenizer; `wkv tokenizer build DIR` writes one")
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
    settings: Preset,
    stop: Sequence[str] = (),
    seed: int | None = None,
    dtype: str = "auto",
    threads: int | None = None,
    state: Path | None = None,
    save: Path | None = None,
) -> str:
    """Stream `prompt` and a continuation, and return both. `state` is a file with what comes before the prompt.

    With `save`, the prompt is only read, and the state behind it written to that file.
    """
    model, tokenizer = load(folder, dtype, threads)
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    if not ids.shape[1]:
        raise ValueError("the prompt is empty; give some text to continue")
    cache = None if state is None else load_state(state, model)
    if save is not None:
        save_state(read_text(model, ids, cache), save, model)
        print(f"{save} is written: {ids.shape[1]} tokens were read", file=sys.stderr)
        return prompt
    if seed is not None:
        torch.manual_seed(seed)
    written = []

    def show(text: str) -> None:
        written.append(text)
        write(text)

    stream = TextStream(tokenizer, show, stop)
    show(prompt)
    model.generate(
        **({"input_ids": ids} if cache is None else continue_from(cache, ids)),
        streamer=stream,
        stopping_criteria=StoppingCriteriaList([stream]),
        max_new_tokens=max_new_tokens,
        **generate_arguments(tokenizer, ids.shape[1], settings),
    )
    show("\n")
    print(report(stream), file=sys.stderr)
    return "".join(written)


def converse(
    folder: Path,
    options: dict,
    max_new_tokens: int,
    seed: int | None = None,
    dtype: str = "auto",
    threads: int | None = None,
    state: Path | None = None,
) -> None:
    """Answer standard input line by line until it ends or says /exit; `options` are those of `Chat`."""
    model, tokenizer = load(folder, dtype, threads)
    talk = Chat(model, tokenizer, start=None if state is None else load_state(state, model), **options)
    if seed is not None:
        torch.manual_seed(seed)
    while True:
        try:
            message = input(f"{talk.format.user}: ").strip()
        except EOFError:
            write("\n")
            return
        command, _, rest = message.partition(" ")
        if command == "/exit":
            return
        try:
            if command == "/retry":
                answer(talk.retry, talk.opening, max_new_tokens)
            elif message.startswith("/"):
                write(obey(talk, command, rest.strip()))
            elif message:
                answer(partial(talk.reply, message), talk.opening, max_new_tokens)
        # A wrong file name must not end a conversation.
        except (OSError, ValueError) as error:
            print(f"wkv: {error}", file=sys.stderr)


def make_adapter(file: Path, adapter: Path, folder: Path) -> None:
    """Write the adapter that begins texts with the state of an official file; the model's weights are not read."""
    from .peft_state import import_time_state

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    import_time_state(file, model).save_pretrained(adapter)


def answer(speak: Callable[..., TextStream], opening: str, max_new_tokens: int) -> None:
    """Write an answer as it comes; what stands before it shows when the answer is certain to come."""
    shown = []

    def show(text: str) -> None:
        write(text if shown else opening + text)
        shown.append(text)

    stream = speak(show, max_new_tokens)
    write("\n\n")
    print(report(stream), file=sys.stderr)


def obey(talk: Chat, command: str, rest: str) -> str:
    """Do what a line that begins with a slash says, and return what to tell."""
    if command == "/help":
        return COMMANDS
    if command == "/reset":
        talk.reset()
        return "(forgotten)\n"
    if command not in ("/save", "/load"):
        raise ValueError(f"no command {command}; /help lists them")
    if not rest:
        raise ValueError(f"{command} needs the name of a file")
    if command == "/load":
        talk.resume(load_state(rest, talk.model))
        return f"({rest} is loaded)\n"
    if (state := talk.state()) is None:
        raise ValueError("nothing was said yet; there is no state to save")
    save_state(state, rest, talk.model)
    return f"({rest} is written)\n"


def demonstrate(max_new_tokens: int, threads: int | None) -> int:
    """Let the shipped model write here, then once more in a process without the compiled kernels; 1 if they differ."""
    folder = demo_model_path()
    if not folder.is_dir():
        raise ValueError(f"{folder}: the demo model is not part of this build; `wkv generate FOLDER` runs any other")
    threads = threads or torch.get_num_threads()
    print(f"RWKV-7 from {folder}, through AutoModelForCausalLM and AutoTokenizer, continues:\n", file=sys.stderr)
    text = generate_text(folder, PROMPT, max_new_tokens, DEMO, seed=SEED, dtype="float32", threads=threads)
    print("\nThe same once more in plain PyTorch, without the compiled kernels ...", file=sys.stderr)
    options = {
        "--max-new-tokens": max_new_tokens,
        "--temperature": DEMO.temperature,
        "--top-p": DEMO.top_p,
        "--presence-penalty": DEMO.presence,
        "--frequency-penalty": DEMO.frequency,
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
