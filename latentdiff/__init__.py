"""latentdiff: train your own text-to-image latent diffusion model from a folder of captioned pictures.

`LatentPipeline` and `Schedule` are imported lazily (PEP 562; types in `__init__.pyi`): the models and the command line
import this package too, and need neither.
"""

from importlib import import_module
from typing import Any

from .errors import LatentDiffError, UnfinishedModelWarning
from .installation import check_installation

__version__ = "0.1.0"
__all__ = ["LatentDiffError", "LatentPipeline", "Schedule", "UnfinishedModelWarning", "__version__"]

LAZY = {"LatentPipeline": "latentdiff.sampling.pipeline", "Schedule": "latentdiff.diffusion.schedule"}


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_installation()
    return getattr(import_module(LAZY[name]), name)
