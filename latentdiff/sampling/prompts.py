"""Prompts to text features, with weights: in "a (red:1.4) apple" the word red counts 1.4 times."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from text_encoder import TextEncoder

from ..errors import LatentDiffError

WEIGHTED = re.compile(r"\(([^()]+):\s*(-?\d+(?:\.\d+)?)\)")  # other parentheses are text
MAX_WEIGHT = 10.0


class Span(NamedTuple):
    """Characters `start` to `stop` of a prompt and their weight."""

    start: int
    stop: int
    weight: float


def parse(prompt: str) -> tuple[str, list[Span]]:
    """The prompt without its weights, and where they apply.

    Raises:
        LatentDiffError: a weight beyond 10.
    """
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
    """One prompt or several, as a list.

    Raises:
        LatentDiffError: not text, or no prompt at all.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, list | tuple) else []
    if not prompts or not all(isinstance(entry, str) for entry in prompts):
        raise LatentDiffError(f"prompt={prompt!r:.200}: expected a string or a list of at least one string")
    return prompts


def text_features(
    encoder: TextEncoder, prompts: Sequence[str], encode: Callable[[list[str]], Tensor] | None = None
) -> Tensor:
    """Features (B, L, D). A weight w moves a token's feature from the empty prompt's at its place: 1 changes nothing.

    Every distinct prompt is encoded once, by `encode` where it is given: a call of the encoder in another way.

    Raises:
        LatentDiffError: a weight beyond 10.
        TextEncoderError: a prompt is not valid text.
    """
    parsed = {prompt: parse(prompt) for prompt in prompts}
    encode = encode or encoder
    context = encode([text for text, _ in parsed.values()])
    weights = torch.stack([token_weights(encoder, *parts) for parts in parsed.values()])
    if bool((weights != 1).any()):
        empty = encode([""])
        context = torch.where((weights == 1)[..., None].to(context.device), context,
                              empty + weights[..., None].to(context) * (context - empty))  # fmt: skip
    place = {prompt: index for index, prompt in enumerate(parsed)}
    return context[[place[prompt] for prompt in prompts]]


def token_weights(encoder: TextEncoder, text: str, spans: Sequence[Span]) -> Tensor:
    """The weight of each token, (L,)."""
    weights = torch.ones(encoder.max_length)
    if spans:
        batch = encoder.tokenizer(text, truncation=True, max_length=encoder.max_length, return_offsets_mapping=True)
        for index, (start, stop) in enumerate(batch["offset_mapping"]):
            for span in spans:
                if start < span.stop and stop > span.start:
                    weights[index] = span.weight
    return weights
