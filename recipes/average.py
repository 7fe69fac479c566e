"""Average the weights of several checkpoints of one run into a model folder, in bfloat16.

    python recipes/average.py runs/demo/checkpoint-{2100,2200,2300,2400,2500} --output runs/demo/averaged

The mean of checkpoints along a run predicts unseen text better than any of them, as a lower learning rate would have
("Averaging Weights Leads to Wider Optima and Better Generalization", 2018; "Early Weight Averaging meets High Learning
Rates for LLM Pre-training", 2023). The tokenizer is taken from the run's folder.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from wkv.models.modeling_rwkv7 import RWKV7ForCausalLM
from wkv.models.tokenization_rwkv import RwkvTokenizer


def average(checkpoints: list[Path]) -> RWKV7ForCausalLM:
    """Return the first checkpoint's model with every weight replaced by its mean over all, in float32."""
    model = RWKV7ForCausalLM.from_pretrained(checkpoints[0], dtype=torch.float32)
    weights = [load_file(checkpoint / "model.safetensors") for checkpoint in checkpoints]
    model.load_state_dict({name: sum(w[name].float() for w in weights) / len(weights) for name in weights[0]})
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    for checkpoint in args.checkpoints:
        if not (checkpoint / "model.safetensors").is_file():
            parser.error(f"{checkpoint}: no model.safetensors in it")
    model = average(args.checkpoints)
    model.to(torch.bfloat16).save_pretrained(args.output)
    RwkvTokenizer.from_pretrained(args.checkpoints[0].parent / "tokenizer").save_pretrained(args.output)


if __name__ == "__main__":
    main()
