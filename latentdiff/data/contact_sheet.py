"""Many small pictures with their captions on one sheet."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIDE = 128  # pixels of a picture
GAP = 8
LETTERS = 22  # of a line of caption, in FONT_SIZE about as wide as a picture
LINES = 3
FONT_SIZE = 11
LINE_HEIGHT = 14
COLUMNS = 8


def contact_sheet(pictures: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Square RGB pictures in rows of eight, the caption below each cut to three lines; blank if there are none."""
    columns = min(COLUMNS, max(1, len(pictures)))
    width, height = SIDE + GAP, SIDE + GAP + LINES * LINE_HEIGHT
    rows = max(1, math.ceil(len(pictures) / columns))
    sheet = Image.new("RGB", (GAP + columns * width, GAP + rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for place, (picture, caption) in enumerate(pictures):
        row, column = divmod(place, columns)
        left, top = GAP + column * width, GAP + row * height
        sheet.paste(picture.resize((SIDE, SIDE)), (left, top))
        lines = textwrap.wrap(caption, LETTERS, max_lines=LINES, placeholder=" ...")
        for number, line in enumerate(lines):
            draw.text((left, top + SIDE + 2 + number * LINE_HEIGHT), line, fill="black", font=font)
    return sheet
