"""Where a picture becomes pixels: from the bytes of a file to upright, opaque, square RGB, and to a tensor; and back.

Colour profiles are not applied. Whatever is wrong with a file, the only exception is `PictureError`.
"""

import io
import threading
import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import LatentDiffError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # of their files
PLAIN_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # what Pillow itself turns into RGB
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")

_warnings_lock = threading.Lock()


class PictureError(LatentDiffError):
    """A picture that cannot be used.

    `reason` is what kind of trouble it is: unreadable, truncated, format, too large or too small.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it comes through from a worker process
        self.reason = reason

    def __str__(self) -> str:
        return ": ".join(self.args)


def open_picture(data: bytes, *, max_pixels: int, background: tuple[int, int, int]) -> Image.Image:
    """Decode a JPEG, PNG, WebP, GIF, BMP or TIFF file to an upright RGB picture; of an animation the first frame.

    Args:
        data: the file's bytes.
        max_pixels: width times height above which it is refused, before it is decoded. Pillow's own limit of twice
            `Image.MAX_IMAGE_PIXELS`, about 179 million, holds as well.
        background: red, green, blue that shows through where the picture is transparent.

    Raises:
        PictureError: unreadable, truncated, too large, or of another format.
    """
    try:
        # What Pillow warns of in odd files is an error here where it matters. Python's list of warning filters belongs
        # to all threads, hence one at a time: decode in processes, not in threads.
        with _warnings_lock, warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
            if image.width * image.height > max_pixels:
                raise PictureError("too large", f"{image.width} x {image.height} is more than {max_pixels} pixels")
            image.load()
            with suppress(Exception):  # broken metadata is no reason to refuse sound pixels
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image, background)
    except PictureError:
        raise
    except Exception as error:  # decoders meet broken files with nearly every exception there is
        raise PictureError(*_diagnosis(data, error)) from None


def fit(image: Image.Image, image_size: int, *, min_size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Cut out the middle square of an RGB picture and resize it: uint8 (image_size, image_size, 3).

    Raises:
        PictureError: too small, the shorter side has fewer than `min_size` pixels.
    """
    width, height = image.size
    side = min(width, height)
    if side < min_size:
        raise PictureError("too small", f"{width} x {height}, and the shorter side needs {min_size} (data.min_size)")
    left, top = (width - side) // 2, (height - side) // 2
    resample = Image.Resampling.LANCZOS if side > image_size else Image.Resampling.BICUBIC
    # As `box`: resizing all of a 100 x 100,000 strip before it is cut would take a thousand times the memory.
    box = (left, top, left + side, top + side)
    return np.array(image.resize((image_size, image_size), resample, box, reducing_gap=3.0), dtype=np.uint8)


def to_pixels(images: Tensor) -> Tensor:
    """Pictures uint8 (B, H, W, 3) to pixels (B, 3, H, W) in [-1, 1], channels-last."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] to B RGB pictures of 8 bits: round((x + 1) * 127.5), clipped; NaN is black.

    Raises:
        LatentDiffError: the shape is another.
    """
    if pixels.dim() != 4 or pixels.shape[1] != 3:
        raise LatentDiffError(f"pixels have shape {tuple(pixels.shape)}; expected (B, 3, H, W)")
    # What a cast makes of NaN differs between machines, and a training that went wrong should still be drawn.
    levels = ((pixels.detach().float() + 1.0) * 127.5).nan_to_num(nan=0.0).round().clamp(0.0, 255.0)
    return [Image.fromarray(image) for image in levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()]


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Pixels of any mode as RGB of 8 bits, transparency over the background.

    Raises:
        PictureError: a mode without a fixed range of brightness.
    """
    if image.mode in DEEP_MODES:
        return _from_16_bit(image).convert("RGB")
    if image.mode not in PLAIN_MODES + ALPHA_MODES:
        raise PictureError("format", f"pixels of mode {image.mode} have no fixed range of brightness or no RGB")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, background)
        image.paste(layer, mask=layer.getchannel("A"))
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Grey values 0 ... 65535 as 0 ... 255, rounded; Pillow's own conversion would clip everything above 255."""
    values = np.asarray(image.convert("I"))
    if values.min() < 0 or values.max() > 65535:
        raise PictureError("format", f"grey values {values.min()} to {values.max()}; expected 16 bits, 0 to 65535")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _diagnosis(data: bytes, error: Exception) -> tuple[str, str]:
    """Reason and detail of what Pillow stumbled over."""
    if not data:
        return "unreadable", "the file is empty"
    # Pillow says nothing of use about a cut WebP, but the file says how long it should be.
    if data[:4] == b"RIFF" and len(data) < (expected := 8 + int.from_bytes(data[4:8], "little")):
        return "truncated", f"{len(data)} bytes of {expected}"
    if isinstance(error, Image.DecompressionBombError):
        return "too large", str(error)
    if isinstance(error, UnidentifiedImageError):
        return "format", f"no {', '.join(FORMATS)} file, or one with a broken header"
    reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
    return reason, f"{type(error).__name__}: {error}"
