"""The rules of the layout: who may import whom, and what must not be written."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("latentdiff", "unet", "vae", "text_encoder")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
CORE = ("schedule", "diffusion", "samplers", "guidance", "errors")

# Beside the standard library; None: whatever the other rules leave.
ALLOWED = {
    "unet": {"torch", "safetensors", "unet", "xformers"},
    "vae": {"torch", "safetensors", "vae"},
    "text_encoder": {"torch", "transformers", "tokenizers", "safetensors", "text_encoder"},
    **{f"latentdiff.{name}": {"torch", "latentdiff.errors", "latentdiff.schedule"} for name in CORE},
}
# Modules that only some places may import.
RESERVED = {
    "accelerate": ("latentdiff.training", "latentdiff.data"),
    "diffusers": ("latentdiff.weights",),
    "xformers": ("unet.attention",),
    "pickle": (),
    "dill": (),
    "joblib": (),
    "marshal": (),
    "shelve": (),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Every module that a source imports, also inside functions, relative ones resolved."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module))
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + is_package]
            found |= {".".join([*base, *(node.module or alias.name).split(".")]) for alias in node.names}
    return found


def within(name: str, places: object) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    wrong = []
    for name in sorted(imports(source, module, is_package)):
        if name.split(".")[0] in sys.stdlib_module_names and name.split(".")[0] not in RESERVED:
            continue
        for place, allowed in ALLOWED.items():
            if within(module, [place]) and not within(name, allowed):
                wrong.append(f"{module} imports {name}; {place} may import {', '.join(sorted(allowed))}")
        for reserved, places in RESERVED.items():
            if within(name, [reserved]) and not within(module, places):
                wrong.append(f"{module} imports {name}, which is for {', '.join(places) or 'nobody'}")
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_keep_to_the_layers(path):
    assert not violations(path.read_text(), module_name(path), path.name == "__init__.py")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("unet.model", "import vae"),
        ("unet.model", "from latentdiff.schedule import Schedule"),
        ("unet.model", "import numpy"),
        ("vae.model", "def f():\n    from unet.attention import sdpa"),
        ("vae.model", "from xformers.ops import memory_efficient_attention"),
        ("text_encoder.bert", "import diffusers"),
        ("latentdiff.samplers", "from unet import UNet"),
        ("latentdiff.samplers", "from .diffusion import to_x0"),
        ("latentdiff.samplers", "from . import pipeline"),
        ("latentdiff.schedule", "import diffusers.schedulers"),
        ("latentdiff.pipeline", "import accelerate"),
        ("latentdiff.pipeline", "from diffusers import DDIMScheduler"),
        ("latentdiff.training.loop", "import pickle"),
    ],
)
def test_the_rules_notice(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("latentdiff.weights.folder", "import diffusers"),
        ("latentdiff.training.loop", "from accelerate import Accelerator"),
        ("latentdiff.samplers", "import math\nfrom .schedule import Schedule\nfrom torch import Tensor"),
        ("unet.model", "from .config import UNetConfig\nimport torch.nn.functional as F"),
    ],
)
def test_the_rules_let_through(module, source):
    assert not violations(source, module)


FORBIDDEN_CALLS = {"torch.load", "torch.save", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "eval", "exec"}
FORBIDDEN_CALLS |= {"accelerator.save_state", "accelerator.load_state"}


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    first = function.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_are_rooms_and_functions_thoughts(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 320
    assert path.name not in ("utils.py", "helpers.py", "common.py")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert code_lines(node) <= 50, node.name
        if isinstance(node, ast.ClassDef):
            assert not node.name.endswith("Manager"), node.name
            assert not node.name.startswith("Base"), node.name
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f"line {node.lineno}"


def test_no_contiguous_in_the_models():
    """Channels-last end to end: only writing a file may lay tensors out otherwise."""
    for path in SOURCES:
        if path.parts[-2] in ("unet", "vae") and path.name != "folder.py":
            assert ".contiguous(" not in path.read_text(), path


def test_no_init_in_tests():
    """tests/unet would shadow the package unet."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
