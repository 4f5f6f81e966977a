"""The map holds: packages import one way, and nothing but what DESIGN allows is required."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("nf4", "kernels", "models", "eval", "train", "benchmarks", "qlora")
BANNED = {"transformers", "tokenizers", "datasets", "peft", "accelerate", "huggingface_hub", "evaluate"}


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def files(layer: str) -> list[Path]:
    return [ROOT / "qlora.py"] if layer == "qlora" else sorted((ROOT / layer).rglob("*.py"))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_from_those_before_it(layer):
    later = set(LAYERS[LAYERS.index(layer) + 1 :])
    assert files(layer)
    for path in files(layer):
        assert not imported(path) & later, f"{path} imports upwards"


def test_no_hugging_face_package_but_safetensors_is_imported():
    for path in [p for layer in LAYERS for p in files(layer)] + sorted((ROOT / "tests").glob("*.py")):
        assert not imported(path) & BANNED, path


def required(name: str, extras: frozenset[str] = frozenset()) -> set[str]:
    """Everything that installing a distribution would install, by the metadata of what is installed."""
    seen: set[str] = set()
    queue = [(name, extras)]
    while queue:
        name, extras = queue.pop()
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # needed on another platform only
        for need in needs:
            requirement, _, marker = need.partition(";")
            extra = re.search(r"extra == ['\"]([^'\"]+)", marker)
            if extra and extra.group(1) not in extras:
                continue
            found = re.match(r"\s*([A-Za-z0-9._-]+)", requirement)
            assert found
            normal = re.sub(r"[-_.]+", "-", found.group(1)).lower()
            if normal not in seen:
                seen.add(normal)
                queue.append((normal, frozenset()))
    return seen


def test_no_hugging_face_package_but_safetensors_is_required():
    tree = required("qlora-from-scratch", frozenset({"dev"}))
    assert {"torch", "safetensors", "sympy"} <= tree  # the walk goes down: sympy comes with torch
    assert not tree & {name.replace("_", "-") for name in BANNED}


def test_importing_the_library_needs_only_its_core():
    """What only some runs use is imported where it is used: a second and 100 MB less for all the others."""
    later = ["tiktoken", "gguf", "tyro", "rich", "matplotlib", "rouge_score", "nltk", "triton", "torch._dynamo"]
    code = f"import sys, nf4, kernels, models, train; print(*set({later}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
