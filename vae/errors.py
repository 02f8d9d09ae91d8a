"""The one exception of this package for a user's mistake."""


class VAEError(ValueError):
    """A configuration, file or input that the VAE cannot use; the message names it and says what is allowed."""
