"""The denoising UNet: `UNet`, its `UNetConfig`, and `UNetError` for invalid input; `Experts`, several for one model."""

from .config import UNetConfig
from .errors import UNetError
from .experts import Denoiser, Experts
from .model import UNet

__all__ = ["Denoiser", "Experts", "UNet", "UNetConfig", "UNetError"]
