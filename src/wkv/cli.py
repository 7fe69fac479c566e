"""The command `wkv`. Each command imports what it needs: `wkv --help` loads neither torch nor transformers."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    name="wkv",
    help="RWKV for Hugging Face: convert, generate, chat.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
tokenizer_app = typer.Typer(help="Work with the World tokenizer.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")

Folder = Annotated[Path, typer.Argument(help="Folder of a model and its tokenizer.", show_default=False)]
Vocabulary = Annotated[
    Path | None,
    typer.Option(help="The official rwkv_vocab_v20230424.txt; by default the one in the installed `rwkv` package."),
]
Temperature = Annotated[float, typer.Option(min=0, help="Sharpens what is left after the top-p cut; 0 is greedy.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Cut, at temperature 1, before the temperature; 0 is greedy.")]
Presence = Annotated[float, typer.Option(help="Taken from the logit of every token that came before.")]
Frequency = Annotated[float, typer.Option(help="Taken once more for each time it came, fading by 0.996 a token.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as stored.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch's own choice.")]


@app.command()
def info() -> None:
    """Versions, instruction set, threads, and which backend serves each operator."""
    from .information import print_information

    print_information()


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A .pth or .safetensors file, or a folder.", show_default=False)],
    destination: Annotated[Path, typer.Argument(help="What to write; it must not exist yet.", show_default=False)],
    to: Annotated[Literal["hf", "pth"], typer.Option(help="A folder for from_pretrained, or an official file.")] = "hf",
    vocab: Vocabulary = None,
    tokenizer: Annotated[bool, typer.Option(help="Write the World tokenizer into the folder.")] = True,
    check: Annotated[
        bool, typer.Option("--check", help="Refuse NaN and infinity; between layouts, compare the logits.")
    ] = False,
) -> None:
    """Convert between official checkpoints and Hugging Face folders, without loss in either direction."""
    from .checkpoints import convert

    difference = convert(source, destination, to=to, vocab=vocab, tokenizer=tokenizer, check=check)
    if difference is not None:
        print(f"largest difference of the logits before and after: {difference:.1e}")
    elif check:
        print("every weight is finite; the logits were not compared")
    print(f"{destination} is written")


@tokenizer_app.command("build")
def build_tokenizer(
    directory: Annotated[Path, typer.Argument(help="Folder to write the tokenizer to.", show_default=False)],
    vocab: Vocabulary = None,
) -> None:
    """Write the World tokenizer, with a tokenizer.json that needs no plugin."""
    from .vocabulary import save_tokenizer

    tokenizer = save_tokenizer(directory, vocab)
    print(f"{directory} is written: {len(tokenizer)} ids")


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, typer.Argument(help="What to continue; - reads standard input.")] = "-",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Temperature = 1.0,
    top_p: TopP = 0.85,
    presence_penalty: Presence = 0.2,
    frequency_penalty: Frequency = 0.2,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop before; may be given several times.")] = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Continue a prompt: the text goes to standard output as it comes, speed and memory to standard error."""
    from .commands import generate_text

    if prompt == "-":
        prompt = sys.stdin.read()
    settings = {"presence": presence_penalty, "frequency": frequency_penalty}
    generate_text(folder, prompt, max_new_tokens, temperature, top_p, settings, stop or [], seed, dtype, threads)


@app.command()
def chat(
    folder: Folder,
    system: Annotated[str, typer.Option(help="A system message before the first turn.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 500,
    temperature: Temperature = 1.0,
    top_p: TopP = 0.3,
    presence_penalty: Presence = 0.5,
    frequency_penalty: Frequency = 0.5,
    seed: Seed = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:
    """Chat, one line a message, in the official World format. /reset forgets, /exit ends."""
    from .commands import converse

    settings = {
        "temperature": temperature,
        "top_p": top_p,
        "presence": presence_penalty,
        "frequency": frequency_penalty,
    }
    converse(folder, system, max_new_tokens, settings, seed, dtype, threads)


@app.command()
def demo(
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 200,
    threads: Threads = None,
) -> int:
    """Let the shipped model continue a speech, and again without the compiled kernels, to see that both agree."""
    from .commands import demonstrate

    return demonstrate(max_new_tokens, threads)


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


def _refuse(message: str) -> int:
    print("wkv: " + " ".join(message.split()), file=sys.stderr)
    return 2
