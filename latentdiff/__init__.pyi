"""Types of the names that `latentdiff` imports lazily."""

from .diffusion.schedule import Schedule as Schedule
from .errors import LatentDiffError as LatentDiffError
from .sampling.pipeline import LatentPipeline as LatentPipeline

__version__: str
