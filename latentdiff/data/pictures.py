"""Conversion of picture files to upright, opaque, square RGB and to tensors, and of tensors back to pictures.

Color profiles are not applied. Whatever is wrong with a file, the only exception raised is `PictureError`.
"""

import io
import os
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..errors import LatentDiffError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PLAIN_MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr")  # Pillow converts these to RGB by itself
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
BYTES_PER_PIXEL, EXTRA_BYTES = 16, 32 << 20  # most bytes of a file: 16 bits for each of 4 channels, twice, and metadata
HEAD_BYTES = 64 << 20  # most bytes of a large file that are read for its size in pixels; Pillow reads a WebP as a whole
PNG_SIGNATURE, PNG_TEXTS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
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
        return _decode(data, max_pixels, background)
    except PictureError:
        raise
    except Exception as error:  # on broken files, decoders raise almost any exception
        if (bare := without_texts(data)) is None:
            raise PictureError(*_diagnose(data, error)) from None
    return open_picture(bare, max_pixels=max_pixels, background=background)


def upright_rgb(image: Image.Image, *, max_pixels: int, background: tuple[int, int, int]) -> Image.Image:
    """Convert an opened picture, which may not have been decoded yet and is turned in place, to an upright RGB one.

    Raises PictureError as `open_picture` does, and whatever Pillow raises on broken pixels.
    """
    if image.width * image.height > max_pixels:
        raise PictureError("too large", f"{image.width} x {image.height} exceeds {max_pixels} pixels")
    image.load()
    with suppress(Exception):  # broken metadata does not make the pixels unusable
        ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image, background)


def read_bounded(path: Path, offset: int = 0, size: int | None = None) -> bytes:
    """Read a picture file, or the part of a file that is one.

    Raises OSError, and PictureError if it has far more bytes than its header has pixels: a file is not read to memory
    just because its name ends in .png.
    """
    if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
        raise PictureError("unreadable", f"{path.name} is not a file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size - offset if size is None else size
        if size > EXTRA_BYTES:
            part = _Part(file, offset, size, HEAD_BYTES)
            try:
                with _warnings_lock, warnings.catch_warnings(action="ignore"):
                    image = Image.open(io.BufferedReader(part), formats=FORMATS)
                    part.left = None  # the frames of a GIF are counted to its end, but not kept
                    frames = getattr(image, "n_frames", 1)
            except PictureError:
                raise
            except Exception as error:
                raise PictureError(*_diagnose(b"?", error)) from None
            if size > (limit := BYTES_PER_PIXEL * image.width * image.height * frames + EXTRA_BYTES):
                raise PictureError(
                    "too large", f"{size:,} bytes for {image.width} x {image.height} pixels; at most {limit:,}"
                )
        file.seek(offset)
        return file.read(size)


class _Part(io.RawIOBase):
    """A part of a file as a file of its own, of which only `left` more bytes can be read; None: any number."""

    def __init__(self, file: BinaryIO, offset: int, size: int, left: int | None) -> None:
        self.file, self.offset, self.size, self.place, self.left = file, offset, size, 0, left

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = io.SEEK_SET, /) -> int:
        self.place = place + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def readinto(self, buffer: Any, /) -> int:
        self.file.seek(self.offset + self.place)
        data = self.file.read(max(0, min(len(buffer), self.size - self.place)))
        if self.left is not None:
            self.left -= len(data)
            if self.left < 0:
                raise PictureError("too large", f"{self.size:,} bytes, more than {HEAD_BYTES:,} of them in its header")
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def without_texts(data: bytes) -> bytes | None:
    """Return a PNG without texts and color profile, which Pillow refuses beyond 1 MB; None if there is none of them."""
    if not data.startswith(PNG_SIGNATURE):
        return None
    kept, place = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while place + 12 <= len(data):  # length, type, data, checksum
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] not in PNG_TEXTS:
            kept.append(data[place:end])
        place = end
    return b"".join(kept) if sum(map(len, kept)) < len(data) else None


def _decode(data: bytes, max_pixels: int, background: tuple[int, int, int]) -> Image.Image:
    # Where Pillow's warnings about odd files matter, it raises an error as well. Warning filters are shared by all
    # threads, hence the lock: to decode in parallel, use processes.
    with _warnings_lock, warnings.catch_warnings(action="ignore"):
        image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
        return upright_rgb(image, max_pixels=max_pixels, background=background)


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
        return _from_16_bit(image, background)
    if image.mode not in PLAIN_MODES + ALPHA_MODES:
        raise PictureError("format", f"mode {image.mode} has no fixed value range or no conversion to RGB")
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, background)
        image.paste(layer, mask=layer.getchannel("A"))
    return image.convert("RGB")


def _from_16_bit(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Scale gray values 0 ... 65535 to 0 ... 255, rounded; Pillow's own conversion would clip everything above 255.

    The background shows where the gray value is the one that a PNG declares transparent.
    """
    values = np.asarray(image.convert("I"))
    if values.min() < 0 or values.max() > 65535:
        raise PictureError("format", f"gray values {values.min()} to {values.max()}; expected 16 bits, 0 to 65535")
    pixels = np.repeat(((values + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if isinstance(transparent := image.info.get("transparency"), int):
        pixels[values == transparent] = background
    return Image.fromarray(pixels)


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
