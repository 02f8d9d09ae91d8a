"""What `from latentdiff import ...` gives."""

from .diffusion.schedule import Schedule as Schedule
from .errors import LatentDiffError as LatentDiffError
from .sampling.pipeline import LatentPipeline as LatentPipeline

__version__: str
