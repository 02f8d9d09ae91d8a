"""Prompts to text features, with weights: "a (red:1.4) apple" gives the word red a weight of 1.4.

Other parentheses are text, and so are a time or a ratio such as (at 10:30) and whatever is written as \\( and \\).
"""

import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from text_encoder import TextEncoder

from ..errors import LatentDiffError
from .settings import check_length

SYNTAX = re.compile(r"\\([()])|\(((?:[^()\\]|\\.)+):\s*(-?\d+(?:\.\d+)?)\)")  # an escape, or words and their weight
RATIO = re.compile(r".*\d:\d+\)", re.DOTALL)  # a time, a ratio, a verse: digits on both sides of the colon
MAX_WEIGHT = 10.0


class Span(NamedTuple):
    """Characters `start` to `stop` of a prompt and their weight."""

    start: int
    stop: int
    weight: float


def parse(prompt: str) -> tuple[str, list[Span]]:
    """Return the prompt without its weights, and the spans to which they apply."""
    prompt, text, spans, done = unicodedata.normalize("NFC", prompt), "", list[Span](), 0
    for match in SYNTAX.finditer(prompt):
        if match[1] or RATIO.fullmatch(match[0]):
            text += prompt[done : match.start()] + (match[1] or match[0])
            done = match.end()
            continue
        words, weight = re.sub(r"\\([()])", r"\1", match[2]), float(match[3])
        if abs(weight) > MAX_WEIGHT:
            raise LatentDiffError(f"prompt weight {match[0]}: expected a number from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
        text += prompt[done : match.start()]
        spans.append(Span(len(text), len(text) + len(words), weight))
        text, done = text + words, match.end()
    return text + prompt[done:], spans


def literal(text: str) -> str:
    """Return the prompt that means a text as it is, whose parentheses weight nothing."""
    return re.sub(r"[()]", r"\\\g<0>", text)


def as_list(prompt: str | Sequence[str]) -> list[str]:
    """Return one prompt or several as a list; raise LatentDiffError if there are none or one is not a string."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, list | tuple) else []
    if not prompts or not all(isinstance(entry, str) for entry in prompts):
        raise LatentDiffError(f"prompt={prompt!r:.200}: expected a string or a list of at least one string")
    check_length("prompt", prompts)
    return prompts


def text_features(
    encoder: TextEncoder, prompts: Sequence[str], encode: Callable[[list[str]], Tensor] | None = None
) -> Tensor:
    """Return text features (B, L, D), encoding each distinct prompt once.

    A weight w scales the difference between a token's feature and the empty prompt's at that position; 1 changes
    nothing. `encode` replaces the call of the encoder. Raises LatentDiffError on a weight beyond 10.
    """
    parsed = {prompt: parse(prompt) for prompt in prompts}
    encode = encode or encoder
    context = encode([text for text, _ in parsed.values()])
    for text, _ in parsed.values():
        if not encoder.knows(text):
            warnings.warn(f"prompt {text!r:.200}: the text encoder knows none of its words", stacklevel=4)
    weights = torch.stack([token_weights(encoder, *parts) for parts in parsed.values()])
    if bool((weights != 1).any()):
        empty = encode([""])
        context = torch.where((weights == 1)[..., None].to(context.device), context,
                              empty + weights[..., None].to(context) * (context - empty))  # fmt: skip
    row = {prompt: index for index, prompt in enumerate(parsed)}
    return context[[row[prompt] for prompt in prompts]]


def token_weights(encoder: TextEncoder, text: str, spans: Sequence[Span]) -> Tensor:
    """Return the weight of each token, (L,)."""
    weights = torch.ones(encoder.max_length)
    if spans:
        for index, (start, stop) in enumerate(encoder.spans(text)):
            for span in spans:
                if start < span.stop and stop > span.start:
                    weights[index] = span.weight
    return weights
