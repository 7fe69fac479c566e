"""Two processes compute what one does: data parallel, fully sharded, split by heads (cases: distributed_cases.py).

Starting two processes takes longer than the cases themselves, so they share them.
"""

import os
import subprocess
import sys
from pathlib import Path

import distributed_cases
import pytest
import torch
from conftest import TINY, busy_model, time_mix, tiny_config
from peft import get_peft_model
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig

import wkv
from wkv.models.rwkv_parallel import HeadsParallel

# Relative to the largest value, where that is above 1. The norm is a sum over all gradients, which partly cancel.
TOLERANCE = {"loss": 1e-5, "grad_norm": 1e-4, "weights": 1e-5, "resumed": 1e-5, "saved": 1e-5}
MODEL_TYPES = sorted(TINY)


def assert_same(actual, expected, what: str) -> None:
    actual, expected = torch.as_tensor(actual), torch.as_tensor(expected)
    assert actual.shape == expected.shape, what
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error <= TOLERANCE[what.partition(":")[0]], f"{what}: error {error:.1e}"


def assert_same_tensors(actual: dict, expected: dict, what: str) -> None:
    assert actual.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        assert_same(actual[name], tensor, f"{what}: {name}")


def check(root: Path, cases: list[str], subtests) -> None:
    """Run the cases in two processes, then each in this one; everything that they return must be the same."""
    distributed_cases.save_models(root, {case.split("-")[1] for case in cases})
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*line, distributed_cases.__file__, str(root), *cases],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
    )
    for case in cases:
        with subtests.test(case):
            files = [root / f"{case}-2" / f"result{rank}.pt" for rank in range(2)]
            assert all(file.is_file() for file in files), result.stderr[-3000:]
            check_case(case, root, [torch.load(file) for file in files])
    assert result.returncode == 0, result.stderr[-3000:]


def check_case(case: str, root: Path, ranks: list[dict]) -> None:
    one = distributed_cases.run(case, root, 1)
    assert one["loss"][0] > 1 and len(one["loss"]) == distributed_cases.STEPS
    for two in ranks:
        assert two.keys() == one.keys()
        for name in {"loss", "grad_norm"} & one.keys():
            assert_same(two[name], one[name], name)
        assert all(map(torch.equal, two["text"], one["text"]))
        for weights in {"weights", "resumed"} & one.keys():
            assert_same_tensors(two[weights], one["weights"], weights)
    saved = [path.relative_to(root / f"{case}-1") for path in (root / f"{case}-1").glob("saved/*.safetensors")]
    assert len(saved) == (0 if case.startswith("root-") else 1)
    for file in saved:
        assert_same_tensors(load_file(root / f"{case}-2" / file), load_file(root / f"{case}-1" / file), "saved")


def test_two_processes_equal_one(tmp_path, subtests):
    """Every mechanism, every generation, but not every pair of them."""
    cases = ["ddp-rwkv", "lora-rwkv6", "state-rwkv5", "fsdp-rwkv7", "root-rwkv7", "tp-rwkv6", "tp-rwkv7"]
    check(tmp_path, cases, subtests)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_mechanism_equals_one_process(model_type, tmp_path, subtests):
    mechanisms = [name for name in distributed_cases.MECHANISMS if not name.startswith("zero")]
    check(tmp_path, [f"{mechanism}-{model_type}" for mechanism in mechanisms], subtests)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_zero_equals_one_process(model_type, tmp_path, subtests, monkeypatch):
    """DeepSpeed, which is no dependency of ours, on CPUs."""
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check(tmp_path, [f"zero2-{model_type}", f"zero3-{model_type}"], subtests)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_heads_that_cannot_be_shared_out_are_refused(model_type):
    config = tiny_config(model_type)
    config.distributed_config = DistributedConfig(tp_size=5, fsdp_size=1)
    with pytest.raises(ValueError, match="tp_size=5 does not divide"):
        _ = config.local_state_shape
    config.distributed_config = DistributedConfig(tp_size=2, fsdp_size=1)
    assert config.local_state_shape == (config.state_shape[0] // 2, *config.state_shape[1:])


def test_a_tuned_state_is_not_split(own_model):
    """The file of such an adapter would hold one process's heads."""
    module = time_mix(get_peft_model(own_model, wkv.StateTuningConfig()).base_model.model)
    with pytest.raises(ValueError, match="tuned state"):
        HeadsParallel().context_around_forward(module, None)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        *((name, {}) for name in MODEL_TYPES),
        ("rwkv5", {"use_gate": False, "decay_per_head": True, "bonus_is_log": True}),
    ],
    ids=[*MODEL_TYPES, "rwkv5-5.0"],
)
def test_plans_name_modules_and_parameters_that_exist(model_type, changes):
    """A plan's line that names nothing would split nothing."""
    model = busy_model(model_type, **changes)
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters())}
    wildcards = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    assert model.tp_plan.keys() | model.fsdp_plan.keys() <= wildcards
    head = "head" if hasattr(model, "head") else "lm_head"
    assert model.fsdp_plan[head] == "keep_full_weight" and model.tp_plan[head] == "colwise_gather_output"


@pytest.mark.parametrize(
    "file", sorted(Path(__file__).parent.parent.glob("recipes/launch/*.yaml")), ids=lambda f: f.name
)
def test_launch_files_are_accelerates(file):
    """accelerate refuses keys that it does not know."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes > 1 and config.mixed_precision == "bf16"
