"""The sdist and the wheel, built and imported from another folder, since a checkout hides missing files."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import typer

import latentdiff

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("latentdiff", "unet", "vae", "text_encoder")
RECIPES = "train_configs"  # installed as latentdiff.recipes
FOLDERS = (*PACKAGES, RECIPES, "benchmarks", "docs", "examples", "tests", ".ci")
FILES = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt", "mkdocs.yml", "train_vae.py",
         "train_latent.py", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE")  # fmt: skip

IMPORT_EVERYTHING = """
import importlib, pathlib, socket, sys

def no_network(*args, **kwargs):
    raise OSError("network access is not allowed here")

sys.modules["torchvision"] = sys.modules["xformers"] = None  # importing them fails, as if they were not installed
socket.socket.connect = socket.getaddrinfo = no_network
site = pathlib.Path(sys.argv[1])
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(site), module.__file__
assert "diffusers" not in sys.modules  # sampling must not import it
assert "debug" in sys.modules["latentdiff.config"].recipes()  # a recipe is found by its name
"""


def build(folder: Path) -> None:
    """Build the sdist from a copy of the sources, so that nothing left in the checkout helps, and the wheel from it."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder / "source")
    program = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=folder / "source", check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    (folder / archive.name.removesuffix(".tar.gz")).rename(folder / "sdist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", folder, folder / "sdist"], check=True, capture_output=True)


@pytest.fixture(scope="session")
def sdist(once) -> Path:
    """The sdist, unpacked."""
    return once("package", build) / "sdist"


@pytest.fixture(scope="session")
def wheel(once) -> Path:
    """The wheel, built offline from the sdist."""
    (built,) = once("package", build).glob("*.whl")
    return built


def test_the_sdist_has_every_file(sdist):
    sources = {path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()}
    sources = {str(path.relative_to(ROOT)) for path in sources if path.parent.name != "__pycache__"} | set(FILES)
    found = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    assert sources <= found
    assert {name for name in found - sources if ".egg-info/" not in name and "build/" not in name} <= {"PKG-INFO"}


def test_contents(wheel):
    """Every module, recipe and asset, py.typed and the license, and nothing else at the top level."""
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


@pytest.mark.slow
def test_imports_without_network_torchvision_and_xformers(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    modules = [name[:-3].replace("/", ".").removesuffix(".__init__") for name in zipfile.ZipFile(wheel).namelist()
               if name.endswith(".py") and name != "latentdiff/norms/triton_kernels.py"]  # needs Triton  # fmt: skip
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
    assert "Typing :: Typed" in metadata
    assert f"\nVersion: {latentdiff.__version__}\n" in metadata
    assert "torch==" in (ROOT / "constraints.txt").read_text().split("\n")[2]  # first, and pinned


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "overwritten",
            r"unet/__init__.py: the package 'unet' of latentdiff was overwritten: run `pip uninstall unet`, then",
        ),
        pytest.param(
            "elsewhere",
            r"other/unet/__init__.py hides the package 'unet' of latentdiff: run `pip uninstall unet`\n",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "missing",
            "the package 'vae' of latentdiff is missing or incomplete: install latentdiff again",
            marks=pytest.mark.slow,
        ),
        ("uninstalled", "the package 'unet' of latentdiff is missing or incomplete: install latentdiff again"),
        pytest.param(
            "file",
            r"text_encoder.py hides the package 'text_encoder' of latentdiff: rename or move it, or run from",
            marks=pytest.mark.slow,
        ),
        ("folder", r"/vae hides the package 'vae' of latentdiff: rename or move it, or run from another folder"),
        pytest.param("symbolic link", None, marks=pytest.mark.slow),
        pytest.param("zip file", None, marks=pytest.mark.slow),
    ],
)
def test_import_names_taken_by_others(wheel, tmp_path, case, message):
    """PyPI has a distribution `unet`, installed over ours here; and whose folder has no text_encoder.py?"""
    site, other, path = tmp_path / "site", tmp_path / "other", []
    zipfile.ZipFile(wheel).extractall(site)
    if case in ("overwritten", "elsewhere"):
        place = site if case == "overwritten" else other
        (place / "unet").mkdir(parents=True, exist_ok=True)
        (place / "unet/__init__.py").write_text("from .unet import UNet\n")
        (place / "unet/unet.py").write_text("class UNet: ...\n")
        (place / "unet-0.8.1.dist-info").mkdir()
        (place / "unet-0.8.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: unet\nVersion: 0.8.1\n")
        (place / "unet-0.8.1.dist-info/RECORD").write_text("unet/__init__.py,,\nunet/unet.py,,\n")
        path = [other] if case == "elsewhere" else []
    elif case in ("missing", "folder"):
        (site / "vae").rename(tmp_path / ("vae" if case == "folder" else "away"))
        if case == "folder":  # with an editable install a folder wins that has no __init__.py
            (tmp_path / "vae/__init__.py").unlink()
    elif case == "uninstalled":  # the other distribution, with the file that it had overwritten
        (site / "unet/__init__.py").unlink()
    elif case == "file":
        (tmp_path / "text_encoder.py").write_text("")
    elif case == "symbolic link":
        (site / "unet").rename(tmp_path / "store")
        (site / "unet").symlink_to(tmp_path / "store")
    else:
        shutil.rmtree(site)
        site = wheel
    libraries = Path(typer.__file__).parents[1]  # without what makes an editable install of ours, which -S leaves out
    path = os.pathsep.join(map(str, [*path, site, libraries]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": ""}
    for words in (["-m", "latentdiff", "schema"], ["-c", "from latentdiff import Schedule"]):
        run = subprocess.run([sys.executable, "-S", *words], cwd=tmp_path, env=environment, capture_output=True,
                             text=True, check=False)  # fmt: skip
        if message is None:
            assert run.returncode == 0, run.stderr
        else:
            assert run.returncode == 1
            assert re.search(message, run.stderr), run.stderr
            assert words[0] == "-c" or run.stderr.count("\n") == 1
