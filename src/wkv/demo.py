"""The small RWKV-7 that ships with the package."""

from pathlib import Path


def demo_model_path() -> Path:
    """Return the folder of the shipped model, for `from_pretrained`; its README.md says what it is and scores."""
    return Path(__file__).with_name("demo_model")
