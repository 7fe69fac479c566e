"""GRPO on a recurrent model: a prompt is read once for its whole group of completions.

`trl.GRPOTrainer` generates from every prompt `num_generations` times over. The state of a prompt costs the same
whatever its length, so here each distinct prompt of a batch is read once and its state copied into the rows of its
group:

    from wkv.grpo import SharedPrefillGRPOTrainer
    SharedPrefillGRPOTrainer(model, reward_funcs, args=GRPOConfig(...), train_dataset=prompts).train()

The completions are those of `GRPOTrainer` up to rounding. Source of GRPO: "DeepSeekMath" (2024), section 4.

Letters: B rows, T tokens of the longest prompt.
"""

from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from trl import GRPOTrainer


def generate_from_shared_prompts(generate, model, input_ids: Tensor, attention_mask: Tensor, **arguments):
    """What `generate(input_ids, attention_mask, ...)` of the model returns; equal rows of the prompts are read once.

    `input_ids` and `attention_mask` (B, T), padded on the left.
    """
    T = input_ids.shape[1]
    if T == 1:
        return generate(input_ids=input_ids, attention_mask=attention_mask, **arguments)
    distinct, row_of = torch.unique(torch.cat([input_ids, attention_mask], 1), dim=0, return_inverse=True)
    cache = DynamicCache(config=model.config)
    # The last token is left to `generate`, which makes the first new one from it.
    with torch.no_grad():
        model(
            input_ids=distinct[:, : T - 1],
            attention_mask=distinct[:, T : 2 * T - 1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    cache.batch_select_indices(row_of)
    return generate(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, **arguments)


@contextmanager
def shared_prompts(model):
    """Within, `model.generate` is `generate_from_shared_prompts`, in eval mode, where decoding is fast."""
    training = model.training
    model.generate = partial(generate_from_shared_prompts, model.generate, model.eval())
    try:
        yield
    finally:
        del model.generate
        model.train(training)


class SharedPrefillGRPOTrainer(GRPOTrainer):
    """A `GRPOTrainer` that reads a prompt once for its group, and resumes as if it had not been interrupted.

    A checkpoint also holds the completions still in use, where they serve several steps, and every epoch has an order
    of its own, so that the steps after it are the same bit for bit.
    """

    def _generate_single_turn(self, *arguments, **options):
        with shared_prompts(self.accelerator.unwrap_model(self.model_wrapped)):
            return super()._generate_single_turn(*arguments, **options)

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if sampler.shuffle:
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(self.args.seed + epoch)
        return sampler

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        torch.save((self._step, self._buffered_inputs), self._rollout_file(output_dir))

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            file = self._rollout_file(checkpoint)
            if not file.is_file():
                raise ValueError(f"{file}: missing: the checkpoint is another trainer's or of fewer processes")
            self._step, self._buffered_inputs = torch.load(file, self.args.device)

    def _rollout_file(self, folder) -> Path:
        return Path(folder, f"rollout_{self.args.process_index}.pt")
