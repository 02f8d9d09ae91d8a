"""The exception that `unet` raises for invalid input."""

from latentdiff.errors import LatentDiffError


class UNetError(LatentDiffError):
    """Invalid configuration, file or input; the message names it and says what is allowed."""
