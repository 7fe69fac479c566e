"""A model whose layers lie on two devices, without a GPU: the cases of test_devices.py.

    python tests/device_cases.py MODEL_TYPE...

Tensors are fake: shapes, types and devices without numbers. Whatever mixes devices raises. The devices are the CPU and
one that this process registers with torch, which is why it is a process of its own.
"""

import sys

import torch
import wkv_kernels
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import tiny_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from transformers import AutoModelForCausalLM


class Card(backend_registration._DummyBackendModule):
    """What torch asks of a device."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend("card", Card())
CARD, CPU = torch.device("card", 0), torch.device("cpu")
SERVES = wkv_kernels.serves


def spread(model):
    """The first block, embeddings and head on the card, the other blocks on the CPU; only what goes in is moved."""
    first, *others = model.base_model.get_blocks()
    for module in model.modules():
        on = CPU if any(module in set(block.modules()) for block in others) else CARD
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(p.detach().to(on)))
    for module, device in ((model, CARD), (first, CARD), *((block, CPU) for block in others), (last_norm(model), CARD)):
        add_hook_to_module(module, AlignDevicesHook(device, skip_keys=model._skip_keys_device_placement))
    return model


def last_norm(model):
    return list(model.base_model.children())[-1]


def assert_with_its_layer(cache):
    for layer, device in zip(cache.layers, (CARD, CPU, CPU), strict=True):
        assert {x.device for x in (*states_of(layer), layer.cumulative_length)} == {device}


def states_of(layer):
    return [x for held in (layer.conv_states, layer.recurrent_states) for x in held.values() if x is not None]


def train(model, ids, mask):
    loss = model.train()(ids, attention_mask=mask, labels=ids).loss
    loss.backward()
    assert loss.device == CARD
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.device == p.device, name


def decode(model, ids, mask):
    """A prompt, then tokens after it, with a mask and without."""
    model.eval()
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        assert_with_its_layer(cache)
        for further in (None, torch.ones(2, ids.shape[1] + 2, dtype=torch.long, device=CARD)):
            out = model(ids[:, :1], attention_mask=further, past_key_values=cache)
            assert out.logits.device == CARD
            assert_with_its_layer(cache)


def serves_card(op: str, device: torch.device, *size) -> bool:
    """As `wkv_kernels.serves`, but the card has every kernel."""
    return device == CARD or SERVES(op, device, *size)


def main(*model_types: str) -> None:
    for model_type in model_types:
        # In plain PyTorch, and with operators of ours as on a GPU.
        for served in (False, True):
            wkv_kernels.serves = serves_card if served else SERVES
            with FakeTensorMode():
                model = spread(AutoModelForCausalLM.from_config(tiny_config(model_type)))
                ids = torch.randint(1, 50, (2, 7), device=CARD)
                train(model, ids, torch.ones_like(ids))
                decode(model, ids, torch.ones_like(ids))


if __name__ == "__main__":
    main(*sys.argv[1:])
