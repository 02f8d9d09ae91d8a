"""The denoising UNet: `UNet`, `UNetConfig`, and `UNetError` for a user's mistake."""

from .config import UNetConfig
from .errors import UNetError
from .model import UNet

__all__ = ["UNet", "UNetConfig", "UNetError"]
