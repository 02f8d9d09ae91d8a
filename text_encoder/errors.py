"""The exception and the warning that `text_encoder` raises for invalid input."""

from latentdiff.errors import LatentDiffError


class TextEncoderError(LatentDiffError):
    """Invalid configuration, file or prompt; the message names it and says what is allowed."""


class TokenOverflowWarning(UserWarning):
    """A prompt with too many tokens; the message shows what is cut off."""
