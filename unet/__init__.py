"""The denoising UNet: `UNet`, its `UNetConfig`, and `UNetError` for invalid input."""

from .config import UNetConfig
from .errors import UNetError
from .model import UNet

__all__ = ["UNet", "UNetConfig", "UNetError"]
