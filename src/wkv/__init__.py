"""RWKV as a first-class citizen of the Hugging Face ecosystem: importing this registers every generation."""

from .auto import register
from .demo import demo_model_path

__version__ = "0.1.0"
__all__ = ["__version__", "demo_model_path", "register"]

register()


def __getattr__(name: str):
    """State tuning, which imports peft and torch when it is first asked for."""
    if name in ("StateTuningConfig", "export_time_state", "import_time_state"):
        from . import peft_state

        return getattr(peft_state, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
