"""State tuning as a PEFT method: it trains the WKV state that every text begins with, one a layer, and nothing else.

    model = get_peft_model(model, wkv.StateTuningConfig())

The states are float32 whatever the model's dtype, and zeros at first, with which the model is what it was. They stand
wherever a text begins: at the start of a row without a cache, and of every packed document. They want a high learning
rate: the official trainers run Adam from 1 down to 0.01 (cosine), after 10 steps of warm-up, without weight decay.

The folder of such an adapter needs this package: without `import wkv` PEFT raises KeyError: 'RWKV_STATE'. The official
file, `blocks.l.att.time_state` (H, V, K), is what other programs read; `export_time_state` and `import_time_state`
translate without loss. RWKV-4 has no such file.

Letters: H heads, K and V the key and value channels of a head, A the width of RWKV-4's time-mix, S the state.
"""

import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, TaskType, load_peft_weights, register_peft_method
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .auto import GENERATIONS
from .models.rwkv_cache import InitialState
from .states import load_time_state, save_time_state

NAME = "rwkv_state"
# The least weight of a tuned state of RWKV-4: nothing beside any key, but not 0, which the operator takes for empty.
LEAST_WEIGHT = 1e-30


def _new_peft_type() -> PeftType:
    """The member of PEFT's enumeration of methods, which knows no other way to grow."""
    name = NAME.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member._sort_order_ = len(PeftType)
        setattr(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    return PeftType[name]


PEFT_TYPE = _new_peft_type()


@dataclass
class StateTuningConfig(PeftConfig):
    """What PEFT is to do; without arguments, tune the states of all layers of a causal language model.

    `target_modules` and `exclude_modules` pick among the modules `initial_state`; `modules_to_save` are trained too.
    """

    task_type: TaskType | str | None = TaskType.CAUSAL_LM
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE


class StateTuningLayer(nn.Module, BaseTunerLayer):
    """The states of the adapters of one layer, in the place of its `initial_state`."""

    adapter_layer_names = (f"{NAME}_S",)

    def __init__(self, base_layer: nn.Module, shape: tuple[int, ...]):
        super().__init__()
        self.base_layer, self.shape = base_layer, tuple(shape)
        self.rwkv_state_S = nn.ParameterDict()
        self.merged_adapters = []
        self._active_adapter = []

    def add(self, adapter_name: str, device: torch.device) -> None:
        """An adapter that changes nothing yet."""
        S = torch.zeros(self.shape, dtype=torch.float32, device=device)
        if len(self.shape) == 2:
            S[:, 1] = 1
        self.rwkv_state_S[adapter_name] = nn.Parameter(S)

    def trained(self) -> nn.Parameter | None:
        """What the active adapter trains, None if there is none."""
        names = [name for name in self.active_adapters if name in self.rwkv_state_S]
        return None if self.disable_adapters or not names else self.rwkv_state_S[names[0]]

    def forward(self) -> torch.Tensor | None:
        """The state of the active adapter, (H, K, V) or (A, 3), float32."""
        S = self.trained()
        if S is None:
            return self.base_layer()
        S = S.float()
        if S.ndim == 3:
            return S
        # Trained are weight w, mean m and exponent p, from 0, 1 and 0. The sum of values w m has a gradient where the
        # weight is 0; by the weight's logarithm it would vanish there, and a sum trained for itself could be that of no
        # weight, a mean without bounds.
        w, m, p = S.unbind(-1)
        return torch.stack([w * m, w.abs() + LEAST_WEIGHT, p], -1)

    def set_adapter(self, adapter_names, inference_mode: bool = False) -> None:
        """As PEFT's. Raises ValueError for two states at once."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if len(held := [name for name in names if name in self.rwkv_state_S]) > 1:
            raise ValueError(f"a text begins with one state, but {', '.join(held)} are to be active; choose one")
        super().set_adapter(adapter_names, inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "a tuned state cannot be merged: a model has no weight for it, and saving the model would lose it; "
            "keep the adapter, or write the state to a file with wkv.export_time_state"
        )

    def unmerge(self) -> None:
        raise ValueError("a tuned state is never merged")


class StateTuningModel(BaseTuner):
    """The base model with tuned states."""

    prefix = f"{NAME}_"
    tuner_layer_cls = StateTuningLayer
    target_module_mapping = {model_type: ["initial_state"] for model_type in GENERATIONS}

    def _prepare_adapter_config(self, peft_config, model_config):
        if (model_type := model_config.get("model_type")) not in GENERATIONS:
            raise ValueError(
                f"a model of type {model_type} has no WKV state to tune; types {', '.join(GENERATIONS)} do"
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if not isinstance(target, (InitialState, StateTuningLayer)):
            raise ValueError(f"{current_key} is no initial state; state tuning targets modules `initial_state` only")
        if isinstance(target, InitialState):
            target = StateTuningLayer(target, parent.state_shape)
            setattr(parent, target_name, target)
        device = next(parent.parameters()).device
        # Where offloaded weights are between calls.
        target.add(adapter_name, torch.device("cpu") if device.type == "meta" else device)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, adapter_names=None, **kwargs):
        if adapter_names is not None:
            raise ValueError("all rows of a batch begin with the active adapter's state: leave out adapter_names")
        yield

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        next(module for module in self.modules() if isinstance(module, StateTuningLayer)).merge()


register_peft_method(name=NAME, config_cls=StateTuningConfig, model_cls=StateTuningModel)


def export_time_state(adapter: nn.Module | str | Path, path: str | Path) -> None:
    """Write tuned states, those of a model's active adapter or in an adapter's folder, as an official file.

    `path` ends in .pth or .safetensors. Raises ValueError for what is no such adapter, does not tune every layer, or
    is of RWKV-4.
    """
    if isinstance(adapter, nn.Module):
        named, n_layers = {name: layer() for name, layer in _layers(adapter).items()}, adapter.config.num_hidden_layers
    else:
        config = PeftConfig.from_pretrained(adapter)
        named, n_layers = {}, 0
        if config.peft_type == PEFT_TYPE:
            named = load_peft_weights(str(adapter), device="cpu")
            # Without a choice of layers it has them all.
            if config.exclude_modules or set(config.target_modules) != {"initial_state"}:
                n_layers = AutoConfig.from_pretrained(config.base_model_name_or_path).num_hidden_layers
    matches = [(re.search(r"\.(\d+)\.att\w*\.initial_state\b", name), S) for name, S in named.items()]
    states = {int(match[1]): S for match, S in matches if match and S is not None}
    if not states:
        raise ValueError(f"{path}: nothing to write: no state is tuned, or its adapter is not active")
    if missing := set(range(max(n_layers, *states))) - states.keys():
        raise ValueError(
            f"{path}: an official file holds the states of all layers, that of {min(missing)} is not tuned"
        )
    save_time_state([states[layer] for layer in sorted(states)], path)


def import_time_state(path: str | Path, model: PreTrainedModel | PeftModel) -> PeftModel:
    """The model with the states of an official file as its adapter; one that it has already takes their values.

    Raises ValueError as `wkv.states.load_state` does, and for an adapter that does not tune every layer.
    """
    states = load_time_state(path, model.config)
    if not _layers(model):
        model = get_peft_model(model, StateTuningConfig())
    tuned = [layer.trained() for layer in _layers(model).values()]
    if len(tuned) != len(states) or any(S is None for S in tuned):
        raise ValueError(f"{path}: the model's active adapter does not tune the states of all layers")
    with torch.no_grad():
        for own, S in zip(tuned, states, strict=True):
            own.copy_(S)
    return model


def _layers(model: nn.Module) -> dict[str, StateTuningLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, StateTuningLayer)}
