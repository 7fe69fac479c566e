"""What a block consists of for the decoding step, which sees LoRA layers as what they adapt."""

from torch import nn

from .rwkv_low_rank import is_lora, low_rank_terms


class Parts:
    """The modules of a module by path, and its parameters by name, as if no adapter were there.

    Initial states are not among them: only a fresh cache asks for those. `loras` holds the LoRA layers around modules,
    `terms` what they add, by the name of the weight they adapt; None where that is more than low-rank terms.
    """

    def __init__(self, module: nn.Module):
        self.modules: dict[str, nn.Module] = {}
        self.loras: dict[str, nn.Module] = {}
        self._add("", module)
        owned = ((path, m._parameters) for path, m in self.modules.items())
        self.parameters = {_join(path, name): p for path, own in owned for name, p in own.items() if p is not None}
        terms = {_join(path, "weight"): low_rank_terms(lora) for path, lora in self.loras.items()}
        self.terms = None if None in terms.values() else terms

    def _add(self, path: str, module: nn.Module) -> None:
        if is_lora(module):
            self.loras[path] = module
            module = module.base_layer
        self.modules[path] = module
        for name, child in module._modules.items():
            if child is not None and name != "initial_state":
                self._add(_join(path, name), child)

    def layout(self) -> tuple[dict, dict]:
        """The class of every module, the shape of every parameter."""
        classes = {path: type(m) for path, m in self.modules.items()}
        return classes, {name: p.shape for name, p in self.parameters.items()}

    def all_modules(self) -> list[nn.Module]:
        """Those of adapters too, as far as products go through them."""
        held = ((lora, part) for lora in self.loras.values() for part in (lora.lora_A, lora.lora_B, lora.lora_dropout))
        adapters = (m for lora, part in held for m in (lora, part, *part.values()))
        return list(dict.fromkeys([*self.modules.values(), *adapters]))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
