"""Conversion of picture files to upright, opaque, square RGB and to tensors, and of tensors back to pictures.

Color profiles are not applied. Whatever is wrong with a file, the only exception raised is `PictureError`.
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
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PLAIN_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # Pillow converts these to RGB by itself
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")

_warnings_lock = threading.Lock()


class PictureError(LatentDiffError):
    """A picture that cannot be used; `reason` is unreadable, truncated, format, too large or too small."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)  # both, so that it survives pickling
        self.reason = reason

    def __str__(self) -> str:
        return ": ".join(self.args)


def open_picture(data: bytes, *, max_pixels: int, background: tuple[int, int, int]) -> Image.Image:
    """Decode a JPEG, PNG, WebP, GIF, BMP or TIFF file, or the first frame of an animation, to an upright RGB picture.

    Args:
        data: the file's bytes.
        max_pixels: limit on width times height, checked before decoding. Pillow's own limit of twice
            `Image.MAX_IMAGE_PIXELS`, about 179 million, also applies.
        background: red, green, blue that shows through transparency.

    Raises:
        PictureError: unreadable, truncated, too large, or in another format.
    """
    try:
        # Where Pillow's warnings about odd files matter, an error is raised below. Warning filters are shared by all
        # threads, hence the lock: to decode in parallel, use processes.
        with _warnings_lock, warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
            if image.width * image.height > max_pixels:
                raise PictureError("too large", f"{image.width} x {image.height} exceeds {max_pixels} pixels")
            image.load()
            with suppress(Exception):  # broken metadata does not make the pixels unusable
                ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image, background)
    except PictureError:
        raise
    except Exception as error:  # on broken files, decoders raise almost any exception
        raise PictureError(*_diagnose(data, error)) from None


def fit(image: Image.Image, image_size: int, *, min_size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Crop an RGB picture to its central square and resize that to uint8 (image_size, image_size, 3).

    Raises PictureError (too small) if the shorter side has fewer than `min_size` pixels.
    """
    width, height = image.size
    side = min(width, height)
    if side < min_size:
        raise PictureError("too small", f"{width} x {height}, but the shorter side needs {min_size} (data.min_size)")
    left, top = (width - side) // 2, (height - side) // 2
    resample = Image.Resampling.LANCZOS if side > image_size else Image.Resampling.BICUBIC
    # Crop via `box`: resizing a 100 x 100,000 strip before cropping would take a thousand times the memory.
    box = (left, top, left + side, top + side)
    return np.array(image.resize((image_size, image_size), resample, box, reducing_gap=3.0), dtype=np.uint8)


def to_pixels(images: Tensor) -> Tensor:
    """Convert uint8 pictures (B, H, W, 3) to float pixels (B, 3, H, W) in [-1, 1], channels-last."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Convert pixels (B, 3, H, W) in [-1, 1] to B 8-bit RGB pictures, round((x + 1) * 127.5) clipped; NaN is black."""
    if pixels.dim() != 4 or pixels.shape[1] != 3:
        raise LatentDiffError(f"pixels have shape {tuple(pixels.shape)}; expected (B, 3, H, W)")
    # Casting NaN is platform-dependent, and a diverged training run should still show its pictures.
    levels = ((pixels.detach().float() + 1.0) * 127.5).nan_to_num(nan=0.0).round().clamp(0.0, 255.0)
    return [Image.fromarray(image) for image in levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()]


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Convert any mode to 8-bit RGB over `background`; raises PictureError for modes without a fixed value range."""
    if image.mode in DEEP_MODES:
        return _from_16_bit(image).convert("RGB")
    if image.mode not in PLAIN_MODES + ALPHA_MODES:
        raise PictureError("format", f"mode {image.mode} has no fixed value range or no conversion to RGB")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, background)
        image.paste(layer, mask=layer.getchannel("A"))
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scale gray values 0 ... 65535 to 0 ... 255, rounded; Pillow's own conversion would clip everything above 255."""
    values = np.asarray(image.convert("I"))
    if values.min() < 0 or values.max() > 65535:
        raise PictureError("format", f"gray values {values.min()} to {values.max()}; expected 16 bits, 0 to 65535")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _diagnose(data: bytes, error: Exception) -> tuple[str, str]:
    """Return the reason and detail of a decoding error."""
    if not data:
        return "unreadable", "the file is empty"
    # Pillow does not recognize a truncated WebP as such, but its header states the length.
    if data[:4] == b"RIFF" and len(data) < (expected := 8 + int.from_bytes(data[4:8], "little")):
        return "truncated", f"{len(data)} of {expected} bytes"
    if isinstance(error, Image.DecompressionBombError):
        return "too large", str(error)
    if isinstance(error, UnidentifiedImageError):
        return "format", f"none of {', '.join(FORMATS)}, or the header is broken"
    reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
    return reason, f"{type(error).__name__}: {error}"
