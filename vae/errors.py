"""The exception of this package for a user's mistake."""

from latentdiff.errors import LatentDiffError


class VAEError(LatentDiffError):
    """A configuration, file or input that cannot be used; the message names it and says what is allowed."""
