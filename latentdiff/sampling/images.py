"""Images and masks from users, as tensors."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.pictures import open_picture, read_bounded, to_images, to_pixels, upright_rgb
from ..errors import LatentDiffError

MAX_PIXELS = 200_000_000  # per image file
OVERSHOOT = 0.25  # of a mask that was resized with a filter, beyond its range
LABELS = 16  # a mask whose largest value is less has numbers of classes, not gray values
WHITE, BLACK = (255, 255, 255), (0, 0, 0)

Picture = Image.Image | str | Path
Mask = Picture | Tensor | np.ndarray[Any, Any]


def load_images(images: Sequence[Picture], size: tuple[int, int]) -> Tensor:
    """Center-crop images to the aspect ratio of `size` and resize them: pixels (B, 3, height, width) in [-1, 1]."""
    if not images:
        raise LatentDiffError("no image given: expected at least one")
    arrays = [np.array(_crop(_open(image), size)) for image in images]
    return to_pixels(torch.from_numpy(np.stack(arrays)))


def load_mask(mask: Mask, image: Picture, size: tuple[int, int]) -> Tensor:
    """Load a mask (1, 1, height, width) in [0, 1], cropped and resized like the image, whose size it must have."""
    opened, picture = _open_mask(mask), _open(image)
    if opened.size != picture.size:
        found, expected = ("{} x {}".format(*each.size) for each in (opened, picture))
        raise LatentDiffError(f"the mask is {found} pixels, but the image is {expected}: expected the same size")
    levels = np.array(_crop(opened, size).convert("L"))
    for level, what in ((0, "black: nothing is drawn"), (255, "white: everything is drawn, and nothing kept")):
        if (levels == level).all():
            warnings.warn(f"the mask is all {what}", stacklevel=4)
    return torch.from_numpy(levels).float()[None, None] / 255.0


def paste(sampled: Image.Image, pixels: Tensor, mask: Tensor) -> Image.Image:
    """Combine the sampled image, where the mask (1, 1, H, W) is 1, with the pixels (1, 3, H, W), where it is 0."""
    (kept,) = to_images(pixels)
    mask_image = Image.fromarray((mask[0, 0] * 255).round().to(torch.uint8).numpy())
    result = Image.composite(sampled, kept, mask_image)
    result.info.update(sampled.info)
    result.encoderinfo = sampled.encoderinfo  # with the settings
    return result


def _open(image: Picture, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Open a picture, given as a file or as a Pillow image of it, with the same result."""
    if not isinstance(image, Image.Image | str | Path):
        raise LatentDiffError(f"image is a {type(image).__name__}: expected a Pillow image or a file name")
    name = "the image" if isinstance(image, Image.Image) else str(image)
    if isinstance(image, Image.Image) and not (image.width and image.height):
        raise LatentDiffError("the image has no pixels")
    try:
        if isinstance(image, Image.Image):
            return upright_rgb(image.copy(), max_pixels=MAX_PIXELS, background=background)
        return open_picture(read_bounded(Path(image)), max_pixels=MAX_PIXELS, background=background)
    except LatentDiffError as error:
        raise LatentDiffError(f"{name}: {error}") from None
    except Exception as error:  # whatever Pillow raises on broken pixels
        raise LatentDiffError(f"{name}: cannot be read ({error})") from None


def _open_mask(mask: Mask) -> Image.Image:
    """Open a mask as gray values 0 to 255; 0 and 1, or booleans, are understood, and transparent parts are kept."""
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu().numpy()
    elif isinstance(mask, Image.Image) and mask.mode in ("I", "F"):
        mask = np.asarray(mask)  # 0 to 255 in 32 bits, which no picture has
    elif not isinstance(mask, np.ndarray):
        mask = np.asarray(_open(mask, BLACK).convert("L"))
    if mask.ndim != 2 or not mask.size:
        raise LatentDiffError(f"the mask has shape {mask.shape}: expected (height, width)")
    return Image.fromarray(_gray_levels(mask))


def _gray_levels(mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return gray values 0 to 255 of a mask of booleans, of numbers from 0 to 1 or to 255, or of 16 bits."""
    if mask.dtype.kind not in "buif":
        raise LatentDiffError(f"the mask has values of type {mask.dtype}: expected numbers or booleans")
    values = mask.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    full = 65535.0 if mask.dtype == np.uint16 and high > 255 else 255.0
    if high <= 1 + OVERSHOOT:
        full = 1.0
    if not low >= -OVERSHOOT * full or not high <= full * (1 + OVERSHOOT) or (full > 1 and high < LABELS):
        raise LatentDiffError(f"the mask has values from {low:g} to {high:g}: expected 0 to 1, or 0 to 255")
    return (values * (255 / full)).round().clip(0, 255).astype(np.uint8)


def _crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Center-crop an image to the aspect ratio of `size` and resize it with the filters used in training."""
    height, width = size
    scale = min(image.width / width, image.height / height)
    box_width, box_height = width * scale, height * scale
    left, top = int((image.width - box_width) / 2), int((image.height - box_height) / 2)
    resample = Image.Resampling.LANCZOS if scale > 1 else Image.Resampling.BICUBIC
    box = (left, top, left + box_width, top + box_height)
    return image.resize((width, height), resample, box=box, reducing_gap=3.0)
