"""Conversion between all layouts of checkpoints, a tensor at a time and without loss: any source, four targets.

What a folder has no place for - the unused v0, v1, v2 of block 0 in some official files, and shapes that differ from
the usual ones in singleton axes - is kept beside the weights in `official_extras.safetensors`, so that the way back
gives the identical dictionary.
"""

import json
from pathlib import Path

from transformers import GenerationConfig
from transformers.utils import CONFIG_NAME

from .checks import logit_difference, refuse_folded_embedding, refuse_nonfinite
from .folders import fla_config, fla_tensors, folder_tensors, hub_config
from .gguf_files import read_gguf_tokenizer, write_gguf
from .models.rwkv_chat_templates import CHAT_TEMPLATES
from .sources import EXTRAS_NAME, Source, as_in_file, attributed, read_source
from .tensor_files import CheckpointError, write_pth, write_safetensors
from .vocabulary import build_tokenizer_for
from .writing import appearing, total_bytes, with_progress, write_shards

TARGETS = ("hf", "pth", "fla", "gguf")


def convert(
    source: str | Path,
    destination: str | Path,
    to: str = "hf",
    vocab: str | Path | None = None,
    tokenizer: bool = True,
    check: bool = False,
    chat_template: str | None = None,
) -> float | None:
    """Convert a checkpoint to another layout: `to` is hf (our Hub folder), pth (official), fla or gguf (llama.cpp).

    `source` is a `.pth`, safetensors or GGUF file or a folder of any of these layouts. A folder and a GGUF file get the
    tokenizer that the number of embedding rows tells, or the one of the vocabulary file `vocab`; none with
    `tokenizer=False`. Its chat template is that of `chat_template` (world, g1 or raven), else the usual one of the
    vocabulary. `destination` appears when it is complete. With `check`, weights that are not finite are refused,
    and the model is run before and after on the same tokens; the largest difference of the float32 logits is returned,
    or None where memory is short.

    Raises `CheckpointError`, one line that names the file and the culprit.
    """
    source, destination = Path(source), Path(destination)
    if to not in TARGETS:
        raise CheckpointError(f"cannot convert to {to!r}: one of {', '.join(TARGETS)} is expected")
    if destination.exists():
        raise CheckpointError(f"{destination}: exists already")
    read = read_source(source)
    if to == read.layout == "hf":
        raise CheckpointError(f"{source}: a Hub folder loads without conversion")
    if check:
        refuse_nonfinite(source, read.tensors | read.unused)
    refuse_folded_embedding(source, read.tensors)
    words = _tokenizer_for(read, vocab, chat_template) if tokenizer and to != "pth" else None
    if to in ("hf", "fla"):
        return _to_folder(read, destination, to, words, check)
    tensors = as_in_file(read)
    with appearing(destination, total_bytes(tensors)) as partial:
        with with_progress(tensors) as counted:
            if to == "pth":
                write_pth(partial, counted)
            else:
                attributed(source, write_gguf, partial, read.version, counted, words)
        return logit_difference(read, partial) if check else None


def _to_folder(source: Source, folder: Path, to: str, words, check: bool) -> float | None:
    config = hub_config(source) if to == "hf" else fla_config(source)
    tensors = folder_tensors(source, source.generation.rows) if to == "hf" else fla_tensors(source)
    with appearing(folder, total_bytes(tensors) + total_bytes(source.unused), folder=True) as partial:
        if to == "hf":
            config.save_pretrained(partial)
            GenerationConfig.from_model_config(config).save_pretrained(partial)
        else:
            (partial / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        if words is not None:
            words.save_pretrained(partial)
        with with_progress(tensors) as counted:
            write_shards(partial, counted)
        if source.unused or source.shapes:
            write_safetensors(partial / EXTRAS_NAME, source.unused, {"shapes": json.dumps(source.shapes)})
        return logit_difference(source, partial) if check else None


def _tokenizer_for(source: Source, vocab: str | Path | None, chat_template: str | None):
    try:
        words = read_gguf_tokenizer(source.path) if source.layout == "gguf" and vocab is None else None
        if words is None:
            return build_tokenizer_for(source.sizes["V"], vocab, chat_template)
        if chat_template is not None:
            words.chat_template = CHAT_TEMPLATES[chat_template]
        return words
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
