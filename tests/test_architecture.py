"""Rules of the code: who may import whom, what a newcomer finds, and what must not be written."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("latentdiff", "unet", "vae", "text_encoder")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LEAVES = {"torch", "safetensors", "latentdiff.errors", "latentdiff.files.tensors", "latentdiff.files.pretrained",
          "latentdiff.norms"}  # fmt: skip
LOOP = {"torch", "latentdiff.errors", "latentdiff.diffusion", "latentdiff.files.scheduler", "latentdiff.sampling.loop",
        "latentdiff.sampling.settings"}  # fmt: skip

# In addition to the standard library; a module not listed here may import whatever the other rules allow.
ALLOWED = {
    "unet": LEAVES | {"unet", "xformers"},
    "vae": LEAVES | {"vae"},
    "text_encoder": LEAVES | {"text_encoder", "transformers", "tokenizers", "huggingface_hub"},
    "latentdiff.files.tensors": {"torch", "safetensors", "latentdiff.errors"},
    "latentdiff.errors": set(),
    "latentdiff.norms": {"torch", "triton", "latentdiff.norms"},
    "latentdiff.diffusion": {"torch", "latentdiff.errors", "latentdiff.diffusion"},
    "latentdiff.sampling.loop": LOOP,
    "latentdiff.sampling.inversion": LOOP,
}
# Modules that only some places may import.
RESERVED = {
    "accelerate": ("latentdiff.training", "latentdiff.data"),
    "diffusers": ("latentdiff.files",),
    "xformers": ("unet.attention",),
    "triton": ("latentdiff.norms.triton_kernels",),
    "pickle": (),
    "dill": (),
    "joblib": (),
    "marshal": (),
    "shelve": (),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Return all modules that a source imports, including those in functions and for type checking only.

    Relative imports are resolved. `from package import name` counts as the package and as its module `name`, if any.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            modules = {f"{name}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= modules if modules and node.level and not node.module else {name, *modules}
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
        ("unet.model", "from latentdiff.diffusion.schedule import Schedule"),
        ("unet.model", "from latentdiff.files import open"),
        ("unet.model", "import numpy"),
        ("vae.model", "def f():\n    from unet.attention import sdpa"),
        ("vae.model", "from xformers.ops import memory_efficient_attention"),
        ("text_encoder.bert", "import diffusers"),
        ("latentdiff.diffusion.samplers", "from unet import UNet"),
        ("latentdiff.diffusion.samplers", "from ..sampling import pipeline"),
        ("latentdiff.sampling.loop", "if TYPE_CHECKING:\n    from unet import UNet"),
        ("latentdiff.sampling.inversion", "from .parts import ModelParts"),
        ("latentdiff.diffusion.schedule", "import diffusers.schedulers"),
        ("latentdiff.sampling.pipeline", "import accelerate"),
        ("latentdiff.sampling.pipeline", "from diffusers import DDIMScheduler"),
        ("latentdiff.training.loop", "import pickle"),
    ],
)
def test_the_rules_reject(module, source):
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("latentdiff.files.ldm_bert", "import diffusers"),
        ("latentdiff.training.loop", "from accelerate import Accelerator"),
        ("latentdiff.diffusion.samplers", "import math\nfrom .schedule import Schedule\nfrom torch import Tensor"),
        ("unet.model", "from .config import UNetConfig\nimport torch.nn.functional as F"),
        ("unet.model", "from latentdiff.files.tensors import load_folder"),
    ],
)
def test_the_rules_accept(module, source):
    assert not violations(source, module)


def needs(name: str) -> set[str]:
    """Return the modules that a module imports, and their parent packages."""
    path = MODULES[name]
    found = set()
    for target in imports(path.read_text(), name, path.name == "__init__.py") & MODULES.keys():
        parts = target.split(".")
        ways = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
        found |= {way for way in ways if not name.startswith(f"{way}.") or way == target}
    return found & MODULES.keys() - {name}


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of an import cycle, in order, or an empty list."""
    done, trail = set(), []

    def visit(name: str) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        trail.append(name)
        found = next((found for target in sorted(graph[name]) if (found := visit(target))), [])
        trail.pop()
        done.add(name)
        return found

    return next((found for name in sorted(graph) if (found := visit(name))), [])


def test_no_import_cycle():
    """This includes imports for type checking, imports in functions, and parent packages."""
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({name: needs(name) for name in MODULES}) == []


def test_the_top_level_is_small():
    entries = {path.name for path in (ROOT / "latentdiff").iterdir() if path.name != "__pycache__"}
    assert len(entries - {"__init__.py", "__init__.pyi", "__main__.py", "py.typed"}) <= 16


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        pytest.param(
            "import unet, vae, text_encoder",
            "transformers tokenizers diffusers pydantic PIL huggingface_hub",
            marks=pytest.mark.slow,
        ),
        ("from latentdiff import LatentPipeline", "transformers tokenizers diffusers datasets accelerate"),
        ("import latentdiff, latentdiff.errors, latentdiff.sampling.settings", "torch numpy PIL transformers"),
    ],
)
def test_imports_are_light(statement, absent):
    """`import unet` takes as long as torch; transformers alone would double it."""
    check = f"import sys; {statement}; print([name for name in {absent.split()} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


# What a newcomer asks, the words to search for, and the file with the answer.
QUESTIONS = [
    ("where is the training step", "train_step", "latentdiff/training/latent.py"),
    ("where is the VAE's training step", "train_step", "latentdiff/training/vae.py"),
    ("where is the noise schedule", "noise schedule", "latentdiff/diffusion/schedule.py"),
    ("where is the noise schedule", "class Schedule", "latentdiff/diffusion/schedule.py"),
    ("where is the sampler loop", "sampling loop", "latentdiff/sampling/loop.py"),
    ("where is the sampler loop", "def sample", "latentdiff/diffusion/samplers.py"),
    ("where is t drawn", "sample_timestep", "latentdiff/data/batches.py"),
    ("where does a picture become pixels", "to_pixels", "latentdiff/data/pictures.py"),
    ("where does a picture become pixels", "def fit", "latentdiff/data/pictures.py"),
    ("where is a checkpoint renamed", "os.rename", "latentdiff/training/checkpoint.py"),
]


@pytest.mark.parametrize(("question", "words", "file"), QUESTIONS)
def test_a_newcomer_finds_it(question, words, file):
    """The file is among the first five hits: those that define the words first, then those that use them most."""

    def hits(path: Path) -> tuple[int, int]:
        text = path.read_text()
        defined = re.search(rf"(?m)^\s*(def|class) \w*{re.escape(words.split()[-1])}", text)
        return (int(bool(defined)), len(re.findall(re.escape(words), text, re.IGNORECASE)))

    found = {str(path.relative_to(ROOT)): hits(path) for path in SOURCES if words.lower() in path.read_text().lower()}
    assert file in sorted(found, key=found.__getitem__, reverse=True)[:5]


FORBIDDEN_CALLS = {"torch.load", "torch.save", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "eval", "exec"}
FORBIDDEN_CALLS |= {"accelerator.save_state", "accelerator.load_state"}


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function, without its docstring."""
    first = function.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_and_functions_are_short(path):
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
    """Models are channels-last end to end: only writing a file may change the memory format."""
    for path in SOURCES:
        if path.parts[-2] in ("unet", "vae"):
            assert ".contiguous(" not in path.read_text(), path


def test_no_init_in_tests():
    """tests/unet would shadow the package unet."""
    assert not list((ROOT / "tests").rglob("__init__.py"))
