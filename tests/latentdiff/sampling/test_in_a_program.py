"""The pipeline within a program: what people hand to it, and what they do with what it gives."""

import io
import json
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import LatentDiffError
from latentdiff.sampling.images import load_mask
from latentdiff.sampling.prompts import Span, parse


def picture(size=(32, 32)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def test_the_settings_survive_saving(pipe, tmp_path):
    """As PNG, by whatever way it is saved, and more than once; other formats have no place for them."""
    (image,) = pipe("a red apple", num_steps=1, seed=5)
    for name in ("one.png", "two.png"):
        image.save(tmp_path / name)
        with Image.open(tmp_path / name) as opened:
            assert json.loads(opened.info["latentdiff"])["seed"] == 5
    image.save(tmp_path / "three.jpg")
    (edited,) = pipe.img2img("a red apple", picture(), num_steps=2, seed=6)
    edited.save(tmp_path / "four.png")
    with Image.open(tmp_path / "four.png") as opened:
        assert json.loads(opened.info["latentdiff"])["strength"] == 0.6


def test_pictures_come_one_by_one(pipe):
    """`draw` yields the same pictures as a call, each batch when it is there."""
    together = pipe(["a red apple"] * 5, num_steps=1, seed=0, batch_size=2)
    drawn = pipe.draw(["a red apple"] * 5, num_steps=1, seed=0, batch_size=2)
    first = next(drawn)
    assert [np.asarray(image).tolist() for image in (first, *drawn)] == [
        np.asarray(image).tolist() for image in together
    ]


@pytest.mark.parametrize(
    ("prompt", "text", "spans"),
    [
        ("a (red:1.4) apple", "a red apple", [(2, 5, 1.4)]),
        ("a clock showing (10:30)", "a clock showing (10:30)", []),
        ("the score is (3:12), in (16:9)", "the score is (3:12), in (16:9)", []),
        (r"miku \(vocaloid\)", "miku (vocaloid)", []),
        (r"\(red:1.4\)", "(red:1.4)", []),
        (r"a (b \(c\):2) d", "a b (c) d", [(2, 7, 2.0)]),
        ("((red:1.4)", "(red", [(1, 4, 1.4)]),
        (r"back\slash (x)", r"back\slash (x)", []),
        ("(chapter 3:1.2)", "chapter 3", [(0, 9, 1.2)]),
        ("(shows 10:05), (aspect 16:9), (John 3:16)", "(shows 10:05), (aspect 16:9), (John 3:16)", []),
    ],
)
def test_prompt_syntax(prompt, text, spans):
    assert parse(prompt) == (text, [Span(*span) for span in spans])


def test_a_prompt_of_megabytes_is_refused_at_once(pipe):
    started = time.monotonic()
    for options in ({"prompt": "x " * 5_000_000}, {"prompt": "a", "negative_prompt": "x" * 10_001}):
        with pytest.raises(LatentDiffError, match=r"characters: expected at most 10,000"):
            pipe(**options)
    assert time.monotonic() - started < 2


def test_numpy_numbers_are_numbers(pipe):
    expected = np.asarray(pipe("a red apple", seed=3, num_steps=2, guidance_scale=5.0, height=32)[0])
    for options in (
        {"seed": np.int64(3)}, {"seed": np.array([3])}, {"num_steps": np.int32(2)}, {"height": np.int64(32)},
        {"guidance_scale": np.float32(5)}, {"num_images": np.uint8(1)}, {"batch_size": np.int64(4)},
        {"guidance_rescale": np.float64(0)},
    ):  # fmt: skip
        settings = {"seed": 3, "num_steps": 2, "guidance_scale": 5.0, "height": 32, **options}
        assert np.array_equal(np.asarray(pipe("a red apple", **settings)[0]), expected), options


def test_moving_and_casting(new_pipe):
    other = new_pipe()
    assert other.to(torch.float64) is other
    assert other.unet.conv_in.weight.dtype == torch.float64
    assert other.to(device="cpu", dtype=torch.float32).device.type == "cpu"
    for wrong in ("nowhere", torch.int8, 3.5, "cuda" if not torch.cuda.is_available() else "cuda:99"):
        with pytest.raises(LatentDiffError):
            other.to(wrong)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_that_are_not_finite_are_an_error(part, new_pipe):
    other = new_pipe()
    weight = other.unet.conv_out.weight if part == "unet" else other.vae.decoder.conv_out.weight
    weight.data[0] = torch.nan
    if part == "unet":
        with pytest.raises(
            LatentDiffError, match=r"latents are not finite, as the weights of the UNet are not \(conv_out"
        ):
            other("a red apple", num_steps=1)
    else:
        with pytest.warns(RuntimeWarning, match=r"pixels are not finite, as the weights of the VAE are not"):
            other("a red apple", num_steps=1)


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "P", "I;16", "turned", "cut"])
def test_a_pillow_picture_is_read_like_its_file(pipe, tmp_path, kind):
    """Odd metadata, other modes and damage alike."""
    image, path, options = picture((48, 32)), tmp_path / "picture.png", {}
    if kind in ("RGB", "RGBA", "L", "P"):
        image = image.convert(kind)
    if kind == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize((48, 32)))
    if kind == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {"exif": exif}
    image.save(path, **options)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:600])
        for each in (path, Image.open(io.BytesIO(path.read_bytes()))):
            with pytest.raises(LatentDiffError, match="truncated"):
                pipe.encode(each)
        return
    assert torch.equal(pipe.encode(path), pipe.encode(Image.open(path)))


def test_masks_say_what_is_drawn(pipe):
    """Transparent means keep; 0 and 1, and booleans, are understood; a mask that draws nothing or all of it is said."""
    left = np.zeros((32, 32), np.uint8)
    left[:, :16] = 255
    expected = load_mask(Image.fromarray(left), picture(), (32, 32))
    see_through = Image.fromarray(np.dstack([np.full((32, 32, 3), 255, np.uint8), left]))
    ones = Image.fromarray((left > 0).astype(np.uint8))
    arrays = (left > 0, left, left / 255, left / 250.0 - 0.01, left * np.uint16(257), torch.from_numpy(left > 0))
    for mask in (see_through, ones, *arrays, Image.fromarray(left > 0)):
        assert torch.equal(load_mask(mask, picture(), (32, 32)), expected)
    with pytest.warns(UserWarning, match="the mask is all black: nothing is drawn"):
        load_mask(np.zeros((32, 32)), picture(), (32, 32))
    with pytest.warns(UserWarning, match="the mask is all white: everything is drawn"):
        load_mask(np.ones((32, 32), bool), picture(), (32, 32))
    with pytest.raises(LatentDiffError, match=r"the mask has shape \(2, 3, 4\)"):
        load_mask(np.zeros((2, 3, 4)), picture(), (32, 32))
    for bad in (left / 127.5 - 1, np.where(left, np.nan, 0), left // 100, left * 300.0, left.astype(str), left + 1j):
        with pytest.raises(LatentDiffError, match="the mask has values"):
            load_mask(bad, picture(), (32, 32))


def test_noise_does_not_depend_on_the_default_dtype(pipe):
    before = pipe("a red apple", num_steps=1, seed=0)
    torch.set_default_dtype(torch.float64)
    try:
        assert np.array_equal(*(np.asarray(each[0]) for each in (before, pipe("a red apple", num_steps=1, seed=0))))
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_not_one_picture(pipe, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(LatentDiffError, match=r"pipe\.png is not a file"):
        pipe.img2img("a red apple", tmp_path / "pipe.png")
    with pytest.raises(LatentDiffError, match="2 images to start from: expected one"):
        pipe.img2img("a red apple", [picture(), picture()])
    with pytest.raises(LatentDiffError, match="device='meta': holds no values"):
        pipe.to("meta")


def test_a_prompt_of_unknown_words_is_said(pipe):
    with pytest.warns(UserWarning, match="the text encoder knows none of its words"):
        pipe("\u7ea2\u82f9\u679c", num_steps=1)
