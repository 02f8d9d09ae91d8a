"""Grids of pictures for visual inspection."""

from collections.abc import Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ..data.pictures import to_images
from ..errors import LatentDiffError

CELL = 128  # approximate side of an enlarged small picture, in pixels
GAP = 4  # pixels between cells and around the sheet
FONT_SIZE = 10
LINE = 14  # pixels from one line of text to the next
MAX_LINES = 4  # per caption; a longer one ends in an ellipsis
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
AMPLIFICATION = 4.0  # of differences in a comparison

Picture = Image.Image | np.ndarray
Font = ImageFont.FreeTypeFont


def comparison_grid(pixels: Tensor, reconstruction: Tensor) -> Image.Image:
    """Show three rows: the pictures, their reconstructions, and their absolute differences, amplified four times.

    Both arguments are (B, 3, H, W) in [-1, 1].
    """
    if pixels.shape != reconstruction.shape:
        raise LatentDiffError(f"pixels have shape {tuple(pixels.shape)}, reconstruction {tuple(reconstruction.shape)}")
    difference = AMPLIFICATION * (reconstruction - pixels).abs() - 1.0  # no difference is -1, black
    rows = [to_images(batch) for batch in (pixels, reconstruction, difference)]
    return picture_grid(rows, row_labels=("picture", "reconstruction", f"difference x {AMPLIFICATION:g}"))


def labeled_grid(images: Sequence[Picture], captions: Sequence[str], columns: int = 4) -> Image.Image:
    """Show pictures in reading order, each above its wrapped caption; non-ASCII characters may appear as boxes."""
    if columns < 1 or len(images) != len(captions):
        raise LatentDiffError(
            f"cannot lay out {len(images)} pictures with {len(captions)} captions in {columns} columns"
        )
    parts = [slice(start, start + columns) for start in range(0, len(images), columns)]
    return picture_grid([images[part] for part in parts], captions=[captions[part] for part in parts])


def picture_grid(
    rows: Sequence[Sequence[Picture]], *, row_labels: Sequence[str] = (), captions: Sequence[Sequence[str]] = ()
) -> Image.Image:
    """Show rows of pictures on white. All cells have the size of the largest picture; small pictures are enlarged.

    Args:
        rows: PIL images, or uint8 arrays (H, W, 3) or (H, W); rows may differ in length.
        row_labels: one per row, above it.
        captions: one per picture, below it.

    Raises:
        LatentDiffError: there are no pictures, an array has another type, or labels or captions do not match the rows.
    """
    if not any(rows):
        raise LatentDiffError("a grid needs at least one picture")
    if len(row_labels) not in (0, len(rows)) or (captions and [*map(len, captions)] != [*map(len, rows)]):
        raise LatentDiffError(f"{len(rows)} rows of pictures do not match {len(row_labels)} row labels or the captions")
    cells = [[_cell(picture) for picture in row] for row in rows]
    size = (max(cell.width for row in cells for cell in row), max(cell.height for row in cells for cell in row))
    strips = [_strip(*row, size) for row in zip_longest(cells, row_labels, captions)]
    sheet = Image.new("RGB", (max(strip.width for strip in strips), GAP + sum(strip.height for strip in strips)), WHITE)
    top = GAP
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _strip(
    cells: Sequence[Image.Image], label: str | None, captions: Sequence[str] | None, size: tuple[int, int]
) -> Image.Image:
    """Draw one row: label, pictures, and below them captions; as high as the longest caption needs."""
    width, height = size
    font = _font()
    texts = [_wrap(caption, width, font) for caption in captions or ()]
    top = 0 if label is None else LINE
    bottom = top + height
    text_height = LINE * max(map(len, texts), default=0)
    strip = Image.new("RGB", (GAP + len(cells) * (width + GAP), bottom + text_height + GAP), WHITE)
    draw = ImageDraw.Draw(strip)
    draw.text((GAP, 0), label or "", BLACK, font)
    for column, cell in enumerate(cells):
        strip.paste(cell, (GAP + column * (width + GAP), top))
    for column, lines in enumerate(texts):
        for number, line in enumerate(lines):
            draw.text((GAP + column * (width + GAP), bottom + number * LINE), line, BLACK, font)
    return strip


@cache
def _font() -> Font:
    """Return DejaVu Sans, which comes with matplotlib and has Latin with accents, Greek, Cyrillic and more."""
    from matplotlib import get_data_path  # imported here, as most commands draw no text

    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", FONT_SIZE)


def _cell(picture: Picture) -> Image.Image:
    """Enlarge by the integer factor that brings the longer side closest to CELL; pixels stay square and sharp."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)):
            raise LatentDiffError(f"array is {picture.dtype} {picture.shape}; expected uint8 (H, W, 3) or (H, W)")
        picture = Image.fromarray(picture)
    factor = max(1, round(CELL / max(picture.size)))
    return ImageOps.scale(picture.convert("RGB"), factor, Image.Resampling.NEAREST)


def _wrap(text: str, width: int, font: Font) -> list[str]:
    """Wrap into at most MAX_LINES lines no wider than `width` pixels; a word that is too wide is truncated."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1] + " …"]
    return [_truncate(line, width, font) for line in lines]


def _truncate(line: str, width: int, font: Font) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
