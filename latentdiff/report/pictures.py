"""Pictures inside the page: re-encoded, thinned out evenly and shrunk until they fit."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from ..data.pictures import PictureError, open_picture, read_bounded

MAX_WIDTH, MIN_WIDTH = 1280, 64  # pixels: wider ones are shrunk
MAX_PIXELS = 40_000_000  # of a preview; a larger one is not opened
QUALITY = 80  # of WebP
MOST = 24  # pictures in a series

T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """A picture with its data URI."""

    step: int
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Series:
    """Some of the pictures of a series, and what was left out."""

    pictures: list[Picture]
    notes: list[str]


def embed(files: Sequence[tuple[int, Path]], limit: int) -> Series:
    """Embed pictures in at most `limit` bytes: fewer of them, evenly spaced up to the last, then smaller ones."""
    opened, broken = [], []
    for step, path in _evenly(files, MOST):
        try:
            opened.append((step, open_picture(read_bounded(path), max_pixels=MAX_PIXELS, background=(255, 255, 255))))
        except (PictureError, OSError) as error:
            broken.append(f"{path.name} cannot be shown ({error}).")
    chosen = [(step, image, _encode(image, MAX_WIDTH)) for step, image in opened]
    while len(chosen) > 2 and _size(chosen) > limit:
        chosen = _evenly(chosen, max(2, len(chosen) * 3 // 4))
    width = MAX_WIDTH
    while _size(chosen) > limit and width > MIN_WIDTH:
        width = width * 2 // 3
        chosen = [(step, image, _encode(image, width)) for step, image, _ in chosen]
    shown = [Picture(step, each.uri, each.width, each.height) for step, _, each in chosen]
    notes = [f"{len(shown)} of {len(files)} are shown, evenly spaced."] if len(shown) + len(broken) < len(files) else []
    shrunk = any(picture.width < image.width for _, image, picture in chosen)
    return Series(shown, notes + (["They are shown smaller than they are."] if shrunk else []) + broken)


def _size(chosen: Sequence[tuple[int, Image.Image, Picture]]) -> int:
    return sum(len(picture.uri) for _, _, picture in chosen)


def _evenly(items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` items, evenly spaced from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _encode(image: Image.Image, width: int) -> Picture:
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=QUALITY, method=4)
    return Picture(0, f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}", *image.size)
