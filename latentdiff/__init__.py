"""latentdiff: train your own text-to-image latent diffusion model, from a folder of captioned pictures.

What is named here is imported when it is asked for (PEP 562): the command line and the models do without.
"""

from typing import TYPE_CHECKING, Any

from .errors import LatentDiffError

if TYPE_CHECKING:
    from .diffusion.schedule import Schedule
    from .sampling.pipeline import LatentPipeline
else:

    def __getattr__(name: str) -> Any:
        from importlib import import_module

        places = {"LatentPipeline": ".sampling.pipeline", "Schedule": ".diffusion.schedule"}
        if name not in places:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(places[name], __name__), name)


__version__ = "0.1.0"
__all__ = ["LatentDiffError", "LatentPipeline", "Schedule", "__version__"]
