"""The KL autoencoder: `VAE`, `VAEConfig`, `DiagonalGaussian`, and `VAEError` for a user's mistake.

`LatentStatistics` measures the code over a set of pictures, and `fold_statistics` normalises it.
"""

from .config import VAEConfig
from .distribution import DiagonalGaussian
from .errors import VAEError
from .model import VAE
from .normalize import LatentStatistics, fold_statistics

__all__ = ["VAE", "DiagonalGaussian", "LatentStatistics", "VAEConfig", "VAEError", "fold_statistics"]
