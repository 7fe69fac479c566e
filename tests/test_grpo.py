"""GRPO with the prompts of a group read once: the same completions, fewer tokens read, and an exact resumption."""

import pytest
import torch
from conftest import assert_close, busy_model, random_ids
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import wkv
from wkv.grpo import SharedPrefillGRPOTrainer, generate_from_shared_prompts, shared_prompts

# Of five rows, three prompts of 7, 1 and 4 tokens, the group of the first interrupted by the others.
LENGTHS, ROWS = (7, 1, 4), (0, 1, 0, 2, 0)
OPTIONS = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": -1}


def prompts() -> dict[str, torch.Tensor]:
    """Ids and mask (5, 7), padded on the left."""
    ids = random_ids(len(LENGTHS), max(LENGTHS))
    mask = torch.tensor([[position >= max(LENGTHS) - n for position in range(max(LENGTHS))] for n in LENGTHS]).long()
    return {"input_ids": (ids * mask)[list(ROWS)], "attention_mask": mask[list(ROWS)]}


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "temperature": 0.7}], ids=str)
def test_shared_prompts_change_no_completion(model, options):
    torch.manual_seed(1)
    expected = model.generate(**prompts(), **OPTIONS, **options)
    torch.manual_seed(1)
    shared = generate_from_shared_prompts(model.generate, model, **prompts(), **OPTIONS, **options)
    assert torch.equal(shared.sequences, expected.sequences)
    for actual, wanted in zip(shared.logits, expected.logits, strict=True):
        assert_close(actual, wanted)


def test_prompts_of_one_token(model):
    prompt = {"input_ids": torch.tensor([[3], [3], [5]]), "attention_mask": torch.ones(3, 1, dtype=torch.long)}
    options = {"max_new_tokens": 4, "do_sample": False}
    with shared_prompts(model):
        shared = model.generate(**prompt, **options)
    assert torch.equal(shared, model.generate(**prompt, **options))


def test_a_prompt_is_read_once(model):
    read = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with hook, shared_prompts(model):
        model.generate(**prompts(), max_new_tokens=2, do_sample=False)
    assert read == [(3, 6), (5, 1), (5, 1)]


def test_the_model_is_as_before(own_model):
    own_model.train()
    with pytest.raises(KeyError), shared_prompts(own_model):
        assert not own_model.training and "generate" in vars(own_model)
        raise KeyError
    assert own_model.training and "generate" not in vars(own_model)


def length_reward(completions, **others):
    return [float(len(completion)) for completion in completions]


def make_trainer(folder, steps: int, **changes) -> SharedPrefillGRPOTrainer:
    """A tiny model on 5 prompts, 2 a generation, which serve 4 steps; an epoch has 8."""
    args = GRPOConfig(
        str(folder),
        **{
            "max_steps": steps,
            "save_steps": 10,
            "num_generations": 2,
            "per_device_train_batch_size": 2,
            "steps_per_generation": 2,
            "num_iterations": 2,
            "max_completion_length": 5,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "report_to": "none",
            "disable_tqdm": True,
            **changes,
        },
    )
    return SharedPrefillGRPOTrainer(
        busy_model("rwkv7", vocab_size=4096),
        length_reward,
        args=args,
        train_dataset=Dataset.from_list(
            [{"prompt": prompt} for prompt in ("One", "Two and three", "Four", "Five or", "Six")]
        ),
        processing_class=AutoTokenizer.from_pretrained(wkv.demo_model_path()),
    )


def test_the_trainer_shares_prompts(tmp_path):
    trainer = make_trainer(tmp_path, 1, generation_kwargs={"do_sample": False})
    ids = [[5, 6, 7], [5, 6, 7], [8], [8]]
    read = []
    trainer.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    shared = trainer._generate_single_turn(ids, None, {}, 2)
    assert read[:2] == [(2, 2), (4, 1)]
    assert shared == GRPOTrainer._generate_single_turn(trainer, ids, None, {}, 2)


def test_resumed_training_is_the_uninterrupted_one(tmp_path):
    """From the middle of a generation in the second epoch, to the next generation of the same epoch."""
    whole = make_trainer(tmp_path / "whole", 14)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", 14)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-10"))
    for (name, expected), actual in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(actual, expected), name
