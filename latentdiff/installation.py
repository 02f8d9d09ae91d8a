"""The import names `unet`, `vae` and `text_encoder` are common ones: are they the packages of this distribution?"""

import os
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

from .errors import LatentDiffError

SITE = Path(__file__).parents[1]
EXPORTS = {"unet": "UNetError", "vae": "VAEError", "text_encoder": "TextEncoderError"}


def check_installation() -> None:
    """Raise if one of the import names leads to another distribution, or to a file or folder of the user's."""
    for name, export in EXPORTS.items():
        try:
            spec = find_spec(name)
        except ValueError:  # a module made in memory, which knows no file
            continue
        package = f"the package {name!r} of latentdiff"
        found = _location(spec) if spec else SITE / name
        folder = found.parent if spec and spec.origin else found  # without an __init__.py a folder is a package, too
        if os.path.realpath(folder) != os.path.realpath(SITE / name):
            remedy = _uninstall(name) or "rename or move it, or run from another folder"
            raise LatentDiffError(f"{found} hides {package}: {remedy}")
        if spec is None or spec.origin is None:
            raise LatentDiffError(f"{package} is missing or incomplete: install latentdiff again")
        if found.suffix == ".py" and found.is_file() and export not in found.read_text(encoding="utf-8"):
            remedy = ", then ".join(filter(None, (_uninstall(name), "install latentdiff again")))
            raise LatentDiffError(f"{found}: {package} was overwritten: {remedy}")


def _location(spec: ModuleSpec) -> Path:
    """The file of a module or package; the folder of a package without `__init__.py`."""
    return Path(spec.origin or next(iter(spec.submodule_search_locations or ())))


def _uninstall(name: str) -> str:
    """The command that removes the other distributions with a package of this name; empty if there are none."""
    from importlib.metadata import packages_distributions  # reads every distribution's list of files

    others = sorted(set(packages_distributions().get(name, ())) - {"latentdiff"})
    return f"run `pip uninstall {' '.join(others)}`" if others else ""
