"""Picture grids: sizes, positions and colors of the cells, and captions that stay within theirs."""

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.errors import LatentDiffError
from latentdiff.evaluation.grid import (
    CELL,
    GAP,
    LINE,
    MAX_LINES,
    _font,
    _wrap,
    comparison_grid,
    labeled_grid,
    picture_grid,
    to_images,
)


def plain(color, size=(64, 64)) -> Image.Image:
    return Image.new("RGB", size, color)


def test_every_level_is_preserved():
    levels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    (image,) = to_images(levels / 127.5 - 1)
    assert np.array_equal(np.asarray(image), levels[0].permute(1, 2, 0).numpy())


def test_rounds_to_the_nearest_and_clips():
    values = torch.tensor(
        [-9.0, 9.0, 100.4 / 127.5 - 1, 100.6 / 127.5 - 1, float("nan"), float("inf"), -float("inf"), 0]
    )
    (image,) = to_images(values.view(1, 1, 2, 4).expand(1, 3, 2, 4))
    assert np.asarray(image)[..., 0].tolist() == [[0, 255, 100, 101], [0, 255, 0, 128]]


def test_half_precision_and_gradients():
    (image,) = to_images(torch.ones(1, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True))
    assert image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("side", "cell"), [(8, 128), (32, 128), (48, 144), (64, 128), (100, 100), (256, 256)])
def test_small_pictures_are_enlarged(side, cell):
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    sheet = picture_grid([[noise]])
    assert sheet.size == (cell + 2 * GAP, cell + 2 * GAP)
    found = np.asarray(sheet)[GAP : GAP + cell, GAP : GAP + cell]
    assert np.array_equal(found, noise.repeat(cell // side, 0).repeat(cell // side, 1))


def test_positions():
    sheet = picture_grid([[plain("red"), plain("lime")], [plain("blue")]])
    step = CELL + GAP
    assert sheet.size == (2 * step + GAP, 2 * step + GAP)
    center = GAP + CELL // 2
    assert sheet.getpixel((center, center)) == (255, 0, 0)
    assert sheet.getpixel((center + step, center)) == (0, 255, 0)
    assert sheet.getpixel((center, center + step)) == (0, 0, 255)
    assert sheet.getpixel((center + step, center + step)) == (255, 255, 255)


def test_gray_arrays_and_pictures_of_two_sizes():
    sheet = picture_grid([[np.zeros((64, 32), np.uint8), plain("red", (128, 64))]])
    assert sheet.size == (2 * (128 + GAP) + GAP, 128 + 2 * GAP)
    assert sheet.getpixel((GAP, GAP)) == (0, 0, 0)


def test_comparison():
    pixels = torch.zeros(3, 3, 64, 64)
    reconstruction = pixels + torch.tensor([0.0, 0.1, -0.9]).view(3, 1, 1, 1)
    sheet = comparison_grid(pixels, reconstruction)
    step, row = CELL + GAP, LINE + CELL + GAP
    assert sheet.size == (3 * step + GAP, 3 * row + GAP)
    centers = [GAP + LINE + CELL // 2 + k * row for k in range(3)]
    found = [[sheet.getpixel((GAP + CELL // 2 + k * step, y))[0] for k in range(3)] for y in centers]
    assert found == [[128] * 3, [128, 140, 13], [0, 51, 255]]
    assert np.asarray(sheet)[: GAP + LINE].min() < 100  # the row label


def test_letters_of_many_languages_are_drawn():
    """Pillow's own font drew boxes for letters with accents."""
    box, *letters = (np.asarray(labeled_grid([plain("white")], [text])) for text in ("\ue000", *"äéñøßЖΩ"))
    assert not any(np.array_equal(box, letter) for letter in letters)


def test_captions():
    images = [plain("white") for _ in range(5)]
    empty = np.asarray(labeled_grid(images, [""] * 5, columns=2))
    captions = ["a dog", "a dog that is a good deal too long for one line of text", "", "x", "five"]
    sheet = labeled_grid(images, captions, columns=2)
    assert sheet.width == empty.shape[1] == 2 * (CELL + GAP) + GAP
    lines = len(_wrap(captions[1], CELL, _font()))
    assert 1 < lines <= MAX_LINES
    assert sheet.height == GAP + 3 * (CELL + GAP) + LINE * (lines + 1 + 1)
    ink = np.asarray(sheet).min(2) < 200
    assert ink[GAP + CELL :, :].any()
    assert not ink[: GAP + CELL].any()  # nothing on the pictures
    assert not ink[:, GAP + CELL : GAP + CELL + GAP].any()  # nothing between the columns


@pytest.mark.parametrize("text", ["", "a", "word " * 50, "w" * 200, "short " + "w" * 200 + " end", " two  spaces "])
def test_wrapped_lines_fit(text):
    font = _font()
    lines = _wrap(text, CELL, font)
    assert 1 <= len(lines) <= MAX_LINES
    assert all(font.getlength(line) <= CELL for line in lines)
    words = " ".join(lines)
    assert words == " ".join(text.split()) or words.endswith("…") or "… " in words


@pytest.mark.parametrize(
    "make",
    [
        lambda: picture_grid([]),
        lambda: picture_grid([[]]),
        lambda: picture_grid([[plain("red")]], row_labels=("a", "b")),
        lambda: picture_grid([[plain("red")]], captions=[["a", "b"]]),
        lambda: picture_grid([[np.zeros((4, 4, 3))]]),
        lambda: picture_grid([[np.zeros((4, 4, 2), np.uint8)]]),
        lambda: labeled_grid([plain("red")], [], 1),
        lambda: labeled_grid([plain("red")], ["a"], 0),
        lambda: labeled_grid([], []),
        lambda: comparison_grid(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8)),
        lambda: comparison_grid(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)),
    ],
)
def test_invalid_arguments_raise(make):
    with pytest.raises(LatentDiffError):
        make()
