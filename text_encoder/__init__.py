"""The text encoder, its config and tokenizer training, and its error and warning."""

from .bert import TextEncoder, TextEncoderConfig, TokenizedPrompts
from .errors import TextEncoderError, TokenOverflowWarning
from .tokenizer import train_tokenizer

__all__ = ["TextEncoder", "TextEncoderConfig", "TextEncoderError", "TokenOverflowWarning", "TokenizedPrompts",
           "train_tokenizer"]  # fmt: skip
