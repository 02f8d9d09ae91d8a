"""The text encoder: `TextEncoder`, `TextEncoderConfig`, `train_tokenizer`, and its error and warning."""

from .bert import TextEncoder, TextEncoderConfig, TokenizedPrompts
from .errors import TextEncoderError, TokenOverflowWarning
from .tokenizer import train_tokenizer

__all__ = ["TextEncoder", "TextEncoderConfig", "TextEncoderError", "TokenOverflowWarning", "TokenizedPrompts",
           "train_tokenizer"]  # fmt: skip
