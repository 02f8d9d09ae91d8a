"""Types of the names that `latentdiff` imports lazily."""

from .diffusion.schedule import Schedule as Schedule
from .errors import LatentDiffError as LatentDiffError
from .errors import UnfinishedModelWarning as UnfinishedModelWarning
from .sampling.pipeline import LatentPipeline as LatentPipeline

__version__: str
