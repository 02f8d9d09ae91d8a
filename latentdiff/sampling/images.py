"""Images and masks from users, as tensors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..data.pictures import open_picture, to_images, to_pixels, to_rgb
from ..errors import LatentDiffError

MAX_PIXELS = 200_000_000  # per image file
WHITE = (255, 255, 255)

Picture = Image.Image | str | Path


def load_images(images: Sequence[Picture], size: tuple[int, int]) -> Tensor:
    """Center-crop images to the aspect ratio of `size` and resize them: pixels (B, 3, height, width) in [-1, 1]."""
    if not images:
        raise LatentDiffError("no image given: expected at least one")
    arrays = [np.array(_crop(_open(image), size)) for image in images]
    return to_pixels(torch.from_numpy(np.stack(arrays)))


def load_mask(mask: Picture, image: Picture, size: tuple[int, int]) -> Tensor:
    """Load a mask (1, 1, height, width) in [0, 1], cropped and resized like the image, whose size it must have."""
    gray = isinstance(mask, Image.Image) and mask.mode in ("1", "L", "I", "F")  # 0 to 255, even in 32 bits
    opened, picture = mask.convert("L") if gray and isinstance(mask, Image.Image) else _open(mask), _open(image)
    if opened.size != picture.size:
        found, expected = ("{} x {}".format(*each.size) for each in (opened, picture))
        raise LatentDiffError(f"the mask is {found} pixels, but the image is {expected}: expected the same size")
    return torch.from_numpy(np.array(_crop(opened, size).convert("L"))).float()[None, None] / 255.0


def paste(sampled: Image.Image, pixels: Tensor, mask: Tensor) -> Image.Image:
    """Combine the sampled image, where the mask (1, 1, H, W) is 1, with the pixels (1, 3, H, W), where it is 0."""
    (kept,) = to_images(pixels)
    mask_image = Image.fromarray((mask[0, 0] * 255).round().to(torch.uint8).numpy())
    result = Image.composite(sampled, kept, mask_image)
    result.info.update(sampled.info)
    return result


def _open(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        if not image.width or not image.height:
            raise LatentDiffError("the image has no pixels")
        return to_rgb(ImageOps.exif_transpose(image), WHITE)
    if not isinstance(image, str | Path):
        raise LatentDiffError(f"image is a {type(image).__name__}: expected a Pillow image or a file name")
    try:
        return open_picture(Path(image).read_bytes(), max_pixels=MAX_PIXELS, background=WHITE)
    except (OSError, ValueError) as error:
        if isinstance(error, LatentDiffError):
            raise LatentDiffError(f"{image}: {error}") from None
        raise LatentDiffError(f"{image}: cannot be read ({error})") from None


def _crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Center-crop an image to the aspect ratio of `size` and resize it with the filters used in training."""
    height, width = size
    scale = min(image.width / width, image.height / height)
    box_width, box_height = width * scale, height * scale
    left, top = int((image.width - box_width) / 2), int((image.height - box_height) / 2)
    resample = Image.Resampling.LANCZOS if scale > 1 else Image.Resampling.BICUBIC
    box = (left, top, left + box_width, top + box_height)
    return image.resize((width, height), resample, box=box, reducing_gap=3.0)
