"""A check that the common import names `unet`, `vae` and `text_encoder` refer to the packages of this distribution."""

from importlib.util import find_spec
from pathlib import Path

from .errors import LatentDiffError

SITE = Path(__file__).resolve().parents[1]
EXPORTS = {"unet": "UNetError", "vae": "VAEError", "text_encoder": "TextEncoderError"}
REINSTALL = "pip install --force-reinstall --no-deps latentdiff"


def check_installation() -> None:
    """Raise LatentDiffError if one is missing, hidden by a user's file, or overwritten by another distribution."""
    for name, export in EXPORTS.items():
        spec, ours = find_spec(name), SITE / name / "__init__.py"
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is None:
            raise LatentDiffError(f"the package {name!r} of latentdiff is missing: run `{REINSTALL}`")
        if found != ours:
            raise LatentDiffError(f"{found} hides the package {name!r} of latentdiff: {_remedy(name)}")
        if export not in ours.read_text(encoding="utf-8"):
            raise LatentDiffError(f"{ours}: the package {name!r} of latentdiff was overwritten: {_remedy(name)}")


def _remedy(name: str) -> str:
    from importlib.metadata import packages_distributions  # reads every distribution's list of files

    others = sorted(set(packages_distributions().get(name, ())) - {"latentdiff"})
    return f"run `pip uninstall {' '.join(others)}`, then `{REINSTALL}`" if others else "rename or remove that file"
