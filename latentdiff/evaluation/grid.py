"""Pictures side by side on one sheet, for looking."""

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ..data.pictures import to_images
from ..errors import LatentDiffError

CELL = 128  # pixels that a small picture is enlarged to, about
GAP = 4  # pixels between cells and around the sheet
FONT_SIZE = 11
LINE = 14  # pixels from one line of text to the next
MAX_LINES = 4  # of a caption; a longer one ends in an ellipsis
PAPER, INK = (255, 255, 255), (0, 0, 0)
AMPLIFICATION = 4.0  # of the differences in a comparison

Picture = Image.Image | np.ndarray
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def comparison_grid(pixels: Tensor, reconstruction: Tensor) -> Image.Image:
    """Three rows: the pictures, their reconstructions, the absolute differences four times as bright.

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        reconstruction: the same shape.

    Raises:
        LatentDiffError: the shapes differ or are others.
    """
    if pixels.shape != reconstruction.shape:
        raise LatentDiffError(f"pixels are {tuple(pixels.shape)}, reconstruction {tuple(reconstruction.shape)}")
    difference = AMPLIFICATION * (reconstruction - pixels).abs() - 1.0  # no difference is black, -1
    rows = [to_images(batch) for batch in (pixels, reconstruction, difference)]
    return picture_grid(rows, row_labels=("picture", "reconstruction", f"difference x {AMPLIFICATION:g}"))


def labelled_grid(images: Sequence[Picture], captions: Sequence[str], columns: int = 4) -> Image.Image:
    """Pictures in reading order, each with its caption wrapped beneath it; a character beyond ASCII may show as a box.

    Raises:
        LatentDiffError: there is no picture, not one caption for each, or no column.
    """
    if columns < 1 or len(images) != len(captions):
        raise LatentDiffError(
            f"{len(images)} pictures, {len(captions)} captions, {columns} columns: cannot be laid out"
        )
    parts = [slice(start, start + columns) for start in range(0, len(images), columns)]
    return picture_grid([images[part] for part in parts], captions=[captions[part] for part in parts])


def picture_grid(
    rows: Sequence[Sequence[Picture]], *, row_labels: Sequence[str] = (), captions: Sequence[Sequence[str]] = ()
) -> Image.Image:
    """Rows of pictures on white. All cells are as large as the largest picture; small pictures are enlarged, whole.

    Args:
        rows: Pillow pictures, or uint8 arrays (H, W, 3) or (H, W); rows may differ in length.
        row_labels: one a row, above it.
        captions: one a picture, beneath it.

    Raises:
        LatentDiffError: there is no picture, an array is not such a one, or labels or captions do not match the rows.
    """
    if not any(rows):
        raise LatentDiffError("a grid needs at least one picture")
    if len(row_labels) not in (0, len(rows)) or (captions and [*map(len, captions)] != [*map(len, rows)]):
        raise LatentDiffError(f"{len(rows)} rows of pictures do not match {len(row_labels)} labels or the captions")
    cells = [[_cell(picture) for picture in row] for row in rows]
    size = (max(cell.width for row in cells for cell in row), max(cell.height for row in cells for cell in row))
    strips = [_strip(*row, size) for row in zip_longest(cells, row_labels, captions)]
    sheet = Image.new("RGB", (max(strip.width for strip in strips), GAP + sum(strip.height for strip in strips)), PAPER)
    top = GAP
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _strip(
    cells: Sequence[Image.Image], label: str | None, captions: Sequence[str] | None, size: tuple[int, int]
) -> Image.Image:
    """One row: its label, its pictures, beneath them their captions. As high as the longest caption needs."""
    width, height = size
    font = ImageFont.load_default(FONT_SIZE)
    texts = [_wrap(caption, width, font) for caption in captions or ()]
    top = 0 if label is None else LINE
    bottom = top + height
    text_height = LINE * max(map(len, texts), default=0)
    strip = Image.new("RGB", (GAP + len(cells) * (width + GAP), bottom + text_height + GAP), PAPER)
    draw = ImageDraw.Draw(strip)
    draw.text((GAP, 0), label or "", INK, font)
    for column, cell in enumerate(cells):
        strip.paste(cell, (GAP + column * (width + GAP), top))
    for column, lines in enumerate(texts):
        for number, line in enumerate(lines):
            draw.text((GAP + column * (width + GAP), bottom + number * LINE), line, INK, font)
    return strip


def _cell(picture: Picture) -> Image.Image:
    """Enlarged by the whole factor that brings the longer side nearest to a cell's; pixels stay square and sharp."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (3,)):
            raise LatentDiffError(f"an array of {picture.dtype} {picture.shape}; expected uint8 (H, W, 3) or (H, W)")
        picture = Image.fromarray(picture)
    factor = max(1, round(CELL / max(picture.size)))
    return ImageOps.scale(picture.convert("RGB"), factor, Image.Resampling.NEAREST)


def _wrap(text: str, width: int, font: Font) -> list[str]:
    """Lines no wider than `width` pixels, MAX_LINES at most; a word that is too wide by itself is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1] + " …"]
    return [_cut(line, width, font) for line in lines]


def _cut(line: str, width: int, font: Font) -> str:
    """The line, or as much of it as leaves room for an ellipsis."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
