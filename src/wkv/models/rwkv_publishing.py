"""Pushing to the Hub with the code, so that the repository runs where only transformers is installed.

Saving to a folder copies no code: there our classes are known. What is pushed takes along the module of its class and
its siblings, as transformers does for classes with `register_for_auto_class`.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext


def auto_map(model_class: type) -> dict[str, str]:
    """The entry of config.json that names the code of a model's generation: its configuration and all its models."""
    module = model_class.__module__
    classes = [cls for cls in vars(sys.modules[module]).values() if getattr(cls, "__module__", None) == module]
    named = {cls._auto_name: cls for cls in classes if hasattr(cls, "_auto_name")} | {
        model_class._auto_name: model_class
    }
    named |= {"AutoConfig": model_class.config_class}
    return {name: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for name, cls in sorted(named.items())}


# Threads may push models of the same class.
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def registered(classes: dict[type, str]) -> Iterator[None]:
    """Within, what is saved of these classes takes its code along: each is registered for the auto class named."""
    with _ONE_AT_A_TIME:
        before = {cls: cls._auto_class for cls in classes}
        try:
            for cls, name in classes.items():
                cls.register_for_auto_class(name)
            yield
        finally:
            for cls, name in before.items():
                cls._auto_class = name


class PushesCode:
    """For a class that transformers can save and push: the code goes along when it is pushed, and only then.

    A class defines `_code_goes_along()`, a context in which saving copies the code. An object with an `_auto_class` of
    its own, besides that of its class, is always saved so.
    """

    def push_to_hub(self, *args, **kwargs):
        """As transformers', with the code: the repository runs with `trust_remote_code=True` where this is missing."""
        with self._code_goes_along():
            return super().push_to_hub(*args, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        """As transformers'; with `push_to_hub=True` the folder and the repository get the code too."""
        goes_along = kwargs.get("push_to_hub") or "_auto_class" in vars(self)
        with self._code_goes_along() if goes_along else nullcontext():
            return super().save_pretrained(*args, **kwargs)


class ModelPushesCode(PushesCode):
    """The same for models, whose configurations name the code."""

    @contextmanager
    def _code_goes_along(self) -> Iterator[None]:
        # Of a model with adapters only these are saved.
        if getattr(self, "_hf_peft_config_loaded", False):
            yield
            return
        with registered({type(self): self._auto_name, type(self.config): "AutoConfig"}):
            before, self.config.auto_map = self.config.auto_map, auto_map(type(self))
            try:
                yield
            finally:
                self.config.auto_map = before


class TokenizerPushesCode(PushesCode):
    """The same for tokenizers."""

    def _code_goes_along(self):
        return registered({type(self): "AutoTokenizer"})
