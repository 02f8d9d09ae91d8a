"""Prompts to text features, with weights: "a (red:1.4) apple" gives the word red a weight of 1.4."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from text_encoder import TextEncoder

from ..errors import LatentDiffError

WEIGHTED = re.compile(r"\(([^()]+):\s*(-?\d+(?:\.\d+)?)\)")  # other parentheses are plain text
MAX_WEIGHT = 10.0


class Span(NamedTuple):
    """Characters `start` to `stop` of a prompt and their weight."""

    start: int
    stop: int
    weight: float


def parse(prompt: str) -> tuple[str, list[Span]]:
    """Return the prompt without its weights, and the spans to which they apply."""
    text, spans, done = "", [], 0
    for match in WEIGHTED.finditer(prompt):
        words, weight = match[1], float(match[2])
        if abs(weight) > MAX_WEIGHT:
            raise LatentDiffError(f"prompt weight {match[0]}: expected a number from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
        text += prompt[done : match.start()]
        spans.append(Span(len(text), len(text) + len(words), weight))
        text, done = text + words, match.end()
    return text + prompt[done:], spans


def as_list(prompt: str | Sequence[str]) -> list[str]:
    """Return one prompt or several as a list; raise LatentDiffError if there are none or one is not a string."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, list | tuple) else []
    if not prompts or not all(isinstance(entry, str) for entry in prompts):
        raise LatentDiffError(f"prompt={prompt!r:.200}: expected a string or a list of at least one string")
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
        batch = encoder.tokenizer(text, truncation=True, max_length=encoder.max_length, return_offsets_mapping=True)
        for index, (start, stop) in enumerate(batch["offset_mapping"]):
            for span in spans:
                if start < span.stop and stop > span.start:
                    weights[index] = span.weight
    return weights
