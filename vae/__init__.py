"""The KL autoencoder: `VAE`, `VAEConfig`, `DiagonalGaussian`, and `VAEError` for a user's mistake."""

from .config import VAEConfig
from .distribution import DiagonalGaussian
from .errors import VAEError
from .model import VAE

__all__ = ["VAE", "DiagonalGaussian", "VAEConfig", "VAEError"]
