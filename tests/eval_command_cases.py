"""Tiny models and tasks for the tests of `wkv eval`."""

import json
from pathlib import Path

import yaml
from conftest import busy_model, stir
from transformers import LlamaConfig, LlamaForCausalLM

from wkv.vocabulary import build_tokenizer

PIECES = [b" the", b"\n\n", b"User", "é".encode()]
CHOICES = [" one", " two and the rest", " none", " three"]
CHOOSING = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
}
SCORING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "question",
    "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
}
WRITING = {
    "output_type": "generate_until",
    "doc_to_text": "question",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"max_gen_toks": 6, "until": ["\n"], "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


def save_rwkv(folder: Path, seed: int = 0) -> Path:
    busy_model("rwkv7", vocab_size=320, seed=seed).save_pretrained(folder)
    build_tokenizer(pieces=PIECES).save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    """A transformer, which runs through lm-eval's own model; its tokenizer is read from tokenizer.json."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=320, max_position_embeddings=128, bos_token_id=0, eos_token_id=0, **sizes)
    stir(LlamaForCausalLM(config)).save_pretrained(folder)
    build_tokenizer(pieces=PIECES).save_pretrained(folder)
    description = json.loads((folder / "tokenizer_config.json").read_text())
    description.pop("auto_map", None)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(description | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


def write_tasks(folder: Path, documents: int = 8, version: int = 1, word: str = "What") -> Path:
    """Three tasks, `small_choices`, `small_text` and `small_answers`, and their group `small`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "documents.jsonl"
    asked = [{"question": f"{word} is {i} the {i}?", "choices": CHOICES, "answer": i % 4} for i in range(documents)]
    data.write_text("".join(json.dumps(document) + "\n" for document in asked))
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": version},
    }
    for name, task in {"choices": CHOOSING, "text": SCORING, "answers": WRITING}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": f"small_{name}", **source, **task}))
    members = {"group": "small", "task": ["small_choices", "small_text", "small_answers"]}
    (folder / "small.yaml").write_text(yaml.safe_dump(members | {"metadata": {"version": version}}))
    return folder
