import io
import pickle
import struct
import time
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentdiff.data.pictures import PictureError, fit, open_picture, read_bounded
from latentdiff.errors import LatentDiffError

GREEN = (0, 200, 0)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(data, max_pixels=1_000_000, background=GREEN):
    return open_picture(data, max_pixels=max_pixels, background=background)


def reason(data, **limits):
    with pytest.raises(PictureError) as error:
        opened(data, **limits)
    return error.value.reason


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, color, rows):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.fixture
def photo():
    """Smooth, so that JPEG preserves it, and different in every corner."""
    y, x = np.mgrid[0:24, 0:40]
    return Image.fromarray(np.stack([x * 6, y * 10, 255 - x * 3 - y * 2], -1).astype(np.uint8))


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("PNG", 0), ("BMP", 0), ("TIFF", 0), ("JPEG", 12), ("WEBP", 20), ("GIF", 40)]
)
def test_every_format(photo, kind, tolerance):
    image = opened(encoded(photo, kind))
    assert image.mode == "RGB"
    assert image.size == (40, 24)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(photo)).max() <= tolerance


def test_other_formats_raise(photo):
    assert reason(encoded(photo, "PPM")) == "format"
    assert reason(b"certainly not a picture") == "format"
    assert reason(b"") == "unreadable"


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_opaque_modes(photo, mode):
    image = photo.convert(mode)
    data = encoded(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    assert np.array_equal(np.asarray(opened(data)), np.asarray(image.convert("RGB")))


def test_cmyk_jpeg(photo):
    image = opened(encoded(photo.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(photo)).mean() < 6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_shows_the_background(mode):
    image = Image.new(mode, (4, 2), (90, 90, 90, 0) if mode == "RGBA" else (90, 0))
    if mode == "PA":
        image.putpalette([value for gray in range(256) for value in [gray] * 3])
    image.putpixel((1, 0), (90, 90, 90, 255) if mode == "RGBA" else (90, 255))
    pixels = np.asarray(opened(encoded(image, "TIFF" if mode == "PA" else "PNG")))
    assert tuple(pixels[0, 1]) == (90, 90, 90)
    assert (pixels[1] == GREEN).all()


def test_half_transparent():
    data = encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 128)))
    assert opened(data).getpixel((0, 0)) == (128, 100, 0)


def test_palette_transparency():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    for transparency in (0, bytes([0, 255])):
        pixels = opened(encoded(image, transparency=transparency))
        assert [pixels.getpixel((x, 0)) for x in (0, 1)] == [GREEN, (200, 100, 50)]


def test_a_transparent_color():
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (4, 5, 6))
    pixels = opened(encoded(image, transparency=(1, 2, 3)))
    assert [pixels.getpixel((x, 0)) for x in (0, 1)] == [GREEN, (4, 5, 6)]


def test_16_bits_are_scaled():
    values = np.array([[0, 257, 25_700, 65_535]], dtype=np.uint16)
    expected = [0, 1, 100, 255]
    by_hand = png(4, 1, 16, 0, b"\0" + values.astype(">u2").tobytes())
    for data in (
        by_hand,
        encoded(Image.fromarray(values), "TIFF"),
        encoded(Image.fromarray(values.astype(np.int32)), "TIFF"),
    ):
        assert np.asarray(opened(data))[0, :, 0].tolist() == expected


def test_modes_without_a_value_range_raise():
    assert reason(encoded(Image.new("F", (4, 4), 0.5), "TIFF")) == "format"
    assert reason(encoded(Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32)), "TIFF")) == "format"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 0, 250))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    red, _, blue = opened(data).getpixel((4, 4))
    assert red > 240
    assert blue < 10


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright(kind, orientation):
    """A bright corner ends up where each of the eight EXIF orientations puts it."""
    stored = Image.new("L", (32, 16), 0)
    stored.paste(255, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = opened(encoded(stored.convert("RGB"), kind, exif=exif))
    assert image.size == ((32, 16) if orientation < 5 else (16, 32))
    right, bottom = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    pixel = image.getpixel((image.width - 4 if right else 3, image.height - 4 if bottom else 3))
    assert pixel[0] > 200


@pytest.mark.parametrize("side", [30_000, 100_000])
def test_a_header_of_too_many_pixels_is_rejected_before_decoding(side):
    data = png(side, side, 8, 2, b"")
    assert reason(data) == "too large"
    assert reason(data, max_pixels=2_000_000_000) == "too large"  # Pillow's own limit


def test_max_pixels(photo):
    assert opened(encoded(photo), max_pixels=960).size == (40, 24)
    assert reason(encoded(photo), max_pixels=959) == "too large"


def test_between_pillows_warning_and_its_error(photo, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    before = list(warnings.filters)
    assert opened(encoded(photo)).size == (40, 24)
    assert warnings.filters == before


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("left", [0.7, 0.9])
def test_truncated(kind, left):
    data = encoded(Image.effect_noise((160, 100), 60).convert("RGB"), kind)
    assert reason(data[: int(len(data) * left)]) == "truncated"


def test_broken_exif_is_ignored(photo):
    assert opened(encoded(photo, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x01")).size == (40, 24)


def test_the_error_can_be_pickled():
    error = pickle.loads(pickle.dumps(PictureError("too small", "3 x 4")))  # noqa: S301
    assert isinstance(error, LatentDiffError)
    assert (error.reason, str(error)) == ("too small", "too small: 3 x 4")


GRADIENT = Image.fromarray((np.arange(24 * 24 * 3) % 251).astype(np.uint8).reshape(24, 24, 3))
ORIGINALS = [encoded(GRADIENT, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF")]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(ORIGINALS), st.data())
def test_mutated_files_give_a_picture_or_a_picture_error(original, data):
    mutated = bytearray(original)
    positions = st.integers(0, len(original) - 1)
    for position, value in data.draw(st.lists(st.tuples(positions, st.integers(0, 255)), min_size=1, max_size=8)):
        mutated[position] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            image = opened(bytes(mutated[: data.draw(positions) + 1]) if data.draw(st.booleans()) else bytes(mutated))
        except PictureError:
            return
    assert image.mode == "RGB"


def test_fit_is_exact_without_resizing(photo):
    assert np.array_equal(fit(photo, 24, min_size=1), np.asarray(photo)[:, 8:32])
    assert np.array_equal(
        fit(photo.rotate(90, expand=True), 24, min_size=24), np.asarray(photo.rotate(90, expand=True))[8:32]
    )


@pytest.mark.parametrize("size", [8, 96])
def test_fit_keeps_the_center(size):
    """A vertical edge through the center of a wide picture stays in the center."""
    picture = Image.new("RGB", (90, 30), "black")
    picture.paste("white", (45, 0, 90, 30))
    pixels = fit(picture, size, min_size=30)
    assert pixels.shape == (size, size, 3)
    assert pixels.dtype == np.uint8
    assert pixels[:, : size // 2 - size // 8].max() < 20
    assert pixels[:, size // 2 + size // 8 :].min() > 235


def test_fit_averages_when_downscaling():
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    pixels = fit(Image.fromarray(checks.astype(np.uint8)).convert("RGB"), 8, min_size=8)
    assert np.abs(pixels.astype(int) - 128).max() < 4


def test_too_small(photo):
    with pytest.raises(PictureError, match=r"40 x 24.*needs 25") as error:
        fit(photo, 16, min_size=25)
    assert error.value.reason == "too small"


def test_a_strip_needs_little_memory():
    """Resizing all 1 x 100,000 pixels would give 2000 x 200,000,000."""
    assert fit(Image.new("RGB", (1, 100_000), GREEN), 2000, min_size=1).mean((0, 1)).tolist() == list(GREEN)


def zeros(kind, name=b"k"):
    """A chunk of 2 MB of compressed zeros: text, or a color profile."""
    data = zlib.compress(bytes(2_000_000))
    body = {b"zTXt": name + b"\0\0" + data, b"iCCP": name + b"\0\0" + data,
            b"iTXt": name + b"\0\1\0\0\0" + data, b"tEXt": name + b"\0" + b"x" * 2_000_000}[kind]  # fmt: skip
    return chunk(kind, body)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt", b"tEXt"])
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_a_png_with_megabytes_of_text_has_sound_pixels(photo, kind, before):
    data = encoded(photo)
    place = data.index(before) - 4
    image = opened(data[:place] + zeros(kind) + data[place:])
    assert np.array_equal(np.asarray(image), np.asarray(photo))


def test_such_a_png_is_still_refused_where_its_pixels_are_not_sound(photo):
    data = encoded(photo)
    place = data.index(b"IDAT") - 4
    assert reason(data[:place] + zeros(b"zTXt") + data[place : place + 40]) == "truncated"


@pytest.mark.parametrize("value", [0, 7000, 65535])
def test_a_transparent_gray_value_of_16_bits(value):
    values = np.full((8, 8), 30000, np.uint16)
    values[:, :4] = value
    data = encoded(Image.fromarray(values))
    place = data.index(b"IDAT") - 4
    image = np.asarray(opened(data[:place] + chunk(b"tRNS", struct.pack(">H", value)) + data[place:]))
    assert (image[:, :4] == GREEN).all()
    assert (image[:, 4:] == 117).all()


@pytest.mark.parametrize("name", ["huge.png", "huge.jpg"])
def test_a_file_is_bounded_before_it_is_read(tmp_path, photo, name):
    """16 bytes for each pixel of the header and 32 MiB: a sparse file of 2 GiB takes neither time nor memory."""
    path = tmp_path / name
    path.write_bytes(encoded(photo, "PNG" if name.endswith("png") else "JPEG"))
    small = read_bounded(path)
    with path.open("r+b") as file:
        file.truncate(2 << 30)
    with pytest.raises(PictureError, match=r"too large: 2,147,483,648 bytes for 40 x 24 pixels; at most 33,569,792"):
        read_bounded(path)
    assert read_bounded(path, 0, len(small)) == small
    with path.open("r+b") as file:
        file.truncate(20 << 20)
    assert len(read_bounded(path)) == 20 << 20
    path.write_bytes(b"\0" * 8)
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(PictureError, match="format"):
        read_bounded(path)


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"junK"])
def test_a_gigabyte_before_the_pixels_is_not_read(tmp_path, photo, kind):
    """Pillow reads a chunk as a whole, and a compressed one several times over: 4.8 GB and 30 s for iTXt."""
    data = encoded(photo)
    place = data.index(b"IDAT") - 4
    with (tmp_path / "a.png").open("wb") as file:
        file.write(data[:place] + struct.pack(">I", 10**9) + kind + b"k\0")
        file.seek(10**9, io.SEEK_CUR)  # a hole
        file.write(data[place:])
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(PictureError, match=r"too large: 1,000,000,\d+ bytes, more than .* in its header"):
        read_bounded(tmp_path / "a.png")
    assert time.perf_counter() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_a_large_picture_within_another_file_is_read(tmp_path, kind):
    """The header is found at its place in the file, wherever TIFF puts it."""
    pixels = np.random.default_rng(0).integers(0, 256, (3400, 3400, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), kind, **({"compress_level": 0} if kind == "PNG" else {}))
    assert len(data) > 32 << 20
    (tmp_path / "shard").write_bytes(b"x" * 1000 + data + b"y" * 1000)
    assert read_bounded(tmp_path / "shard", 1000, len(data)) == data
