"""Imports go one way, recipes -> wkv -> (try) wkv_kernels -> torch, and models/ stands alone: it is what we publish."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "src" / "wkv" / "models"
# huggingface_hub and safetensors are dependencies of transformers: where it is, they are.
PUBLISHABLE = {"torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "numpy"}


def files(*folders: Path) -> list:
    return [pytest.param(f, id=str(f.relative_to(ROOT))) for folder in folders for f in sorted(folder.rglob("*.py"))]


def imports(path: Path) -> list[tuple[str, ast.stmt]]:
    """Every imported module of a file, wherever the statement stands; relative ones with their leading dots."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(("." * node.level + (node.module or ""), node))
    return found


def inside_try(path: Path) -> set[int]:
    """Lines of statements that stand in a `try` whose handlers include ImportError."""
    lines = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Try):
            continue
        caught = {
            n.id for handler in node.handlers if handler.type for n in ast.walk(handler.type) if isinstance(n, ast.Name)
        }
        if "ImportError" in caught:
            lines |= {
                child.lineno for statement in node.body for child in ast.walk(statement) if hasattr(child, "lineno")
            }
    return lines


def top(module: str) -> str:
    return module.split(".")[0]


def is_standard(module: str) -> bool:
    return top(module) in sys.stdlib_module_names


@pytest.mark.parametrize("path", files(MODELS))
def test_models_import_only_what_a_published_folder_has(path):
    guarded = inside_try(path)
    for module, node in imports(path):
        where = f"{path.name}:{node.lineno}: {module}"
        if module.startswith("."):
            # transformers copies `from .sibling import name` into the saved folder, and nothing else.
            assert module.count(".") == 1 and len(module) > 1, f"{where}: only `from .sibling import name` is copied"
            assert (MODELS / f"{module[1:]}.py").exists(), f"{where}: no such sibling"
        elif top(module) == "wkv_kernels":
            assert node.lineno in guarded, f"{where}: wkv_kernels must be imported inside try/except ImportError"
        else:
            assert is_standard(module) or top(module) in PUBLISHABLE, f"{where}: not available beside a published model"


def test_models_folder_is_flat():
    assert not [p for p in MODELS.iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert len(list(MODELS.glob("*.py"))) > 3


@pytest.mark.parametrize("path", files(ROOT / "kernels"))
def test_kernels_never_import_the_package(path):
    # The benchmark compares whole models, so it alone may look upwards.
    if path.name.startswith("bench"):
        return
    for module, node in imports(path):
        assert top(module) not in {"wkv", "transformers"}, (
            f"{path.name}:{node.lineno}: kernels know tensors, not models"
        )


@pytest.mark.parametrize("path", files(ROOT / "src"))
def test_the_package_never_imports_recipes_or_tests(path):
    for module, node in imports(path):
        assert top(module) not in {"recipes", "eval", "tests", "conftest", "oracle"}, (
            f"{path.name}:{node.lineno}: {module}"
        )


@pytest.mark.parametrize("path", [p for p in files(ROOT / "src" / "wkv") if MODELS not in p.values[0].parents])
def test_kernels_are_optional_outside_models_too(path):
    guarded = inside_try(path)
    for module, node in imports(path):
        if top(module) == "wkv_kernels":
            assert node.lineno in guarded, (
                f"{path.name}:{node.lineno}: import wkv_kernels inside try/except ImportError"
            )
