"""Pictures a user hands in, as tensors, and back."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..data.pictures import open_picture, to_images, to_pixels, to_rgb
from ..errors import LatentDiffError

MAX_PIXELS = 200_000_000  # of a file
WHITE = (255, 255, 255)

Picture = Image.Image | str | Path


def load_images(images: Sequence[Picture], size: tuple[int, int]) -> Tensor:
    """Pixels (B, 3, height, width) in [-1, 1]: the middle of each picture, as large as fits, resized.

    Raises:
        LatentDiffError: a file cannot be read, or is no picture.
    """
    if not images:
        raise LatentDiffError("no picture given: expected one or more")
    arrays = [np.array(_cut(_open(image), size)) for image in images]
    return to_pixels(torch.from_numpy(np.stack(arrays)))


def load_mask(mask: Picture, image: Picture, size: tuple[int, int]) -> Tensor:
    """A mask (1, 1, height, width) in [0, 1], cut and resized like its picture.

    Raises:
        LatentDiffError: it has not the picture's size, or cannot be read.
    """
    grey = isinstance(mask, Image.Image) and mask.mode in ("1", "L", "I", "F")  # 0 to 255, also in 32 bits
    opened, picture = mask.convert("L") if grey and isinstance(mask, Image.Image) else _open(mask), _open(image)
    if opened.size != picture.size:
        found, expected = ("{} x {}".format(*one.size) for one in (opened, picture))
        raise LatentDiffError(f"the mask is {found} pixels and the picture {expected}: expected the same")
    return torch.from_numpy(np.array(_cut(opened, size).convert("L"))).float()[None, None] / 255.0


def paste(drawn: Image.Image, pixels: Tensor, mask: Tensor) -> Image.Image:
    """The drawn picture where the mask (1, 1, H, W) is 1, the pixels (1, 3, H, W) where it is 0."""
    (kept,) = to_images(pixels)
    whole = Image.fromarray((mask[0, 0] * 255).round().to(torch.uint8).numpy())
    result = Image.composite(drawn, kept, whole)
    result.info.update(drawn.info)
    return result


def _open(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        if not image.width or not image.height:
            raise LatentDiffError("the picture has no pixels")
        return to_rgb(ImageOps.exif_transpose(image), WHITE)
    if not isinstance(image, str | Path):
        raise LatentDiffError(f"a {type(image).__name__} is no picture: expected a Pillow picture or a file's name")
    try:
        return open_picture(Path(image).read_bytes(), max_pixels=MAX_PIXELS, background=WHITE)
    except (OSError, ValueError) as error:
        if isinstance(error, LatentDiffError):
            raise LatentDiffError(f"{image}: {error}") from None
        raise LatentDiffError(f"{image}: cannot be read ({error})") from None


def _cut(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of a picture in the wanted shape, resized with the filters that training uses."""
    height, width = size
    scale = min(image.width / width, image.height / height)
    box_width, box_height = width * scale, height * scale
    left, top = int((image.width - box_width) / 2), int((image.height - box_height) / 2)
    resample = Image.Resampling.LANCZOS if scale > 1 else Image.Resampling.BICUBIC
    box = (left, top, left + box_width, top + box_height)
    return image.resize((width, height), resample, box=box, reducing_gap=3.0)
