"""RWKV as a first-class citizen of the Hugging Face ecosystem: importing this registers every generation."""

from .auto import register
from .demo import demo_model_path

__version__ = "0.1.0"
__all__ = ["__version__", "demo_model_path", "register"]

register()
