"""The one exception of this package for a user's mistake."""


class UNetError(ValueError):
    """A configuration, file or input that the UNet cannot use; the message names it and says what is allowed."""
