"""The one exception of this package for a user's mistake, and the one warning."""

from latentdiff.errors import LatentDiffError


class TextEncoderError(LatentDiffError):
    """A configuration, file or prompt that cannot be used; the message names it and says what is allowed."""


class TokenOverflowWarning(UserWarning):
    """A prompt is longer than the encoder reads; the message shows what is lost."""
