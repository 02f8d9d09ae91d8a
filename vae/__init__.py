"""The KL autoencoder, its posterior, and the statistics that normalize its latents."""

from .config import VAEConfig
from .distribution import DiagonalGaussian
from .errors import VAEError
from .model import VAE
from .normalize import LatentStatistics, fold_statistics

__all__ = ["VAE", "DiagonalGaussian", "LatentStatistics", "VAEConfig", "VAEError", "fold_statistics"]
