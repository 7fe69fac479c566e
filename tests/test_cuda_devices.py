"""On a GPU: layers on it and on the CPU, training in mixed precision in parallel and sharded. Run with `make test-gpu`.

One process each; test_distributed.py has two, on CPUs. test_devices.py proves without a GPU what is where.
"""

import re

import pytest
import torch
from accelerate import dispatch_model
from conftest import assert_close, assert_gradients_close, busy_model, gradients, random_ids
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
# Root mean square error of gradients in half precision, relative to their own.
HALF_PRECISION = 0.01


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "store"
    distributed.init_process_group("nccl", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def device_map(model) -> dict:
    """By the names of accelerate: blocks after the first on the CPU, everything else on the GPU."""
    prefix, blocks = model.base_model_prefix, model.base_model.get_blocks()
    names = [name for name, _ in model.named_children() if name != prefix]
    for name, child in model.base_model.named_children():
        names += [f"{prefix}.{name}{f'.{i}' * (child is blocks)}" for i in range(len(blocks) if child is blocks else 1)]
    return {name: "cpu" if re.search(r"\.[1-9]$", name) else CUDA.index for name in names}


def packed_rows():
    ids = random_ids(2, 40)
    positions = torch.cat([torch.arange(n) for n in (11, 29)])[None].expand(2, -1)
    return {"input_ids": ids, "position_ids": positions, "labels": ids}


@pytest.mark.parametrize("main_device", ["cpu", None], ids=["both_compute", "offloaded"])
def test_layers_on_gpu_and_cpu(model, own_model, main_device):
    """Offloaded layers lie on the CPU and compute on the GPU, without gradients."""
    expected = busy_model(model.config.model_type)
    spread = dispatch_model(own_model, device_map(own_model), main_device=main_device)
    with torch.set_grad_enabled(main_device == "cpu"):
        losses = [m(**packed_rows(), use_cache=False).loss for m in (spread, expected)]
    assert_close(losses[0].cpu(), losses[1])
    if main_device == "cpu":
        for loss in losses:
            loss.backward()
        assert {p.device.type for p in spread.parameters()} == {"cpu", CUDA.type}
        assert_gradients_close({name: g.cpu() for name, g in gradients(spread).items()}, gradients(expected))
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    prompt = random_ids(2, 9)
    texts = spread.generate(prompt.to(CUDA), **settings), model.generate(prompt, **settings)
    assert texts[0].tolist() == texts[1].tolist()


def whole(g):
    return (g.full_tensor() if isinstance(g, DTensor) else g).float()


def step(model, of) -> tuple[torch.Tensor, dict]:
    """Loss and gradients of parameters `of`, by name."""
    ids = random_ids(2, 40).to(CUDA)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach().float(), {name: whole(g) for name, g in gradients(of).items()}


def assert_same_step(actual, expected):
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-3, atol=0)
    assert actual[1].keys() == expected[1].keys()
    for name, g in expected[1].items():
        assert (actual[1][name] - g).norm() <= HALF_PRECISION * g.norm(), name


def test_data_parallel_under_autocast(own_model):
    model = own_model.to(CUDA).train()
    with torch.autocast(CUDA.type, torch.bfloat16):
        expected = step(model, model)
        parallel = DistributedDataParallel(model, device_ids=[CUDA.index])
        assert_same_step(step(parallel, model), expected)


def test_fully_sharded_in_bfloat16(model_type):
    """Weights in float32, products in bfloat16: as a model in bfloat16."""
    expected = busy_model(model_type).to(CUDA, torch.bfloat16).train()
    sharded = busy_model(model_type).to(CUDA).train()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*sharded.base_model.get_blocks(), sharded):
        fully_shard(module, mp_policy=policy)
    assert_same_step(step(sharded, sharded), step(expected, expected))
    assert {p.dtype for p in sharded.parameters()} == {torch.float32}
