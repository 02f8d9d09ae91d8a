"""latentdiff: train your own text-to-image latent diffusion model, from a folder of captioned pictures."""

from .errors import LatentDiffError
from .pipeline import LatentPipeline
from .schedule import Schedule

__version__ = "0.1.0"
__all__ = ["LatentDiffError", "LatentPipeline", "Schedule", "__version__"]
