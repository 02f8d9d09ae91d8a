"""The wheel, built and imported from another folder: a checkout hides what the package forgot."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("latentdiff", "unet", "vae", "text_encoder")
RECIPES = "train_configs"  # installed as latentdiff.recipes
METADATA = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE")

IMPORT_EVERYTHING = """
import importlib, pathlib, socket, sys

def no_network(*args, **kwargs):
    raise OSError("the network was asked for")

sys.modules["torchvision"] = sys.modules["xformers"] = None  # importing them fails, as where they are missing
socket.socket.connect = socket.getaddrinfo = no_network
site = pathlib.Path(sys.argv[1])
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(site), module.__file__
assert "diffusers" not in sys.modules  # whoever only draws does not pay for it
assert "debug" in sys.modules["latentdiff.config"].recipes()  # a recipe is found by its name
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built offline from a copy of the sources, so that nothing left in the checkout helps."""
    folder = tmp_path_factory.mktemp("wheel")
    for package in (*PACKAGES, RECIPES):
        shutil.copytree(ROOT / package, folder / "source" / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in METADATA:
        shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, folder / "source"], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_contents(wheel):
    """Every module, recipe and asset, py.typed and the licence; nothing else at the top level."""
    names = zipfile.ZipFile(wheel).namelist()
    recipes = {f"latentdiff/recipes/{path.relative_to(ROOT / RECIPES)}" for path in (ROOT / RECIPES).rglob("*.yaml")}
    assert "latentdiff/recipes/debug.yaml" in recipes <= set(names)
    assets = {str(path.relative_to(ROOT)) for path in (ROOT / "latentdiff/assets").rglob("*") if path.is_file()}
    assert assets <= set(names)
    modules = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert modules <= set(names)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)


def test_imports_without_network_torchvision_and_xformers(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    modules = [name[:-3].replace("/", ".").removesuffix(".__init__") for name in zipfile.ZipFile(wheel).namelist()
               if name.endswith(".py")]  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", IMPORT_EVERYTHING, site, *modules],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_metadata_names_what_is_imported(wheel):
    archive = zipfile.ZipFile(wheel)
    (path,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = archive.read(path).decode()
    required = set(re.findall(r"^Requires-Dist: ([\w-]+)", metadata, re.MULTILINE))
    assert {"torch", "transformers", "accelerate", "diffusers", "datasets", "safetensors", "xformers"} <= required
    assert "torchvision" not in required
    assert "License: Apache-2.0" in metadata
    assert "torch==" in (ROOT / "constraints.txt").read_text().split("\n")[2]  # first and pinned
