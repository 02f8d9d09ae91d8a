"""From the bytes of a picture file to pixels: upright, opaque, RGB, square.

Colour profiles are not applied. Whatever is wrong with a file, the only exception is `PictureError`.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import LatentDiffError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
PLAIN_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # what Pillow itself turns into RGB
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_warnings_lock = threading.Lock()


class PictureError(LatentDiffError):
    """A picture that cannot be used.

    `reason` is what kind of trouble it is: unreadable, truncated, format, too large or too small.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type[PictureError], tuple[str, str]]:
        return PictureError, (self.reason, self.detail)  # so that it comes through from a worker process


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
        with _no_warnings():
            return to_rgb(_decode(data, max_pixels), background)
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
    # The square goes in as `box`: resizing all of a 100 x 100,000 strip first would take a thousand times the memory.
    square = image.resize(
        (image_size, image_size), resample, box=(left, top, left + side, top + side), reducing_gap=3.0
    )
    return np.array(square, dtype=np.uint8)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Drop Pillow's warnings about odd files: what matters of them is an error here.

    Python's list of warning filters belongs to all threads, hence one at a time. Decode in processes, not in threads.
    """
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _decode(data: bytes, max_pixels: int) -> Image.Image:
    """The upright first frame, in the mode of the file."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
    width, height = image.size
    if width * height > max_pixels:
        raise PictureError("too large", f"{width} x {height} is more than {max_pixels} pixels")
    image.load()
    turn = UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1, upright, where there is none. (Pillow turns a TIFF when it loads it.)"""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # broken metadata is no reason to refuse sound pixels
        return 1
    return value if isinstance(value, int) else 1


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
