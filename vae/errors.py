"""The exception that `vae` raises for invalid input."""

from latentdiff.errors import LatentDiffError


class VAEError(LatentDiffError):
    """Invalid configuration, file or input; the message names it and says what is allowed."""
