"""LatentPipeline: seeds and batches, settings, image editing, and rejected inputs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import LatentDiffError, LatentPipeline
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.evaluation.metrics import psnr
from latentdiff.sampling.images import load_images
from latentdiff.sampling.settings import SamplingOptions, SamplingSettings
from text_encoder import TextEncoderError, TokenOverflowWarning

PROMPTS = ["a red apple", "a blue car on the road", "an emoji of a smiling face", "a green apple"] * 2
FEW = {"num_steps": 3, "seed": 5}


def picture(size=(32, 32), seed=0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_equals_its_members(pipe, sampler, largest_difference):
    """8 prompts at once, in batches of 3, and one by one: the same images, even if steps add noise."""
    together = pipe(PROMPTS, sampler=sampler, **FEW)
    apart = pipe(PROMPTS, sampler=sampler, batch_size=3, **FEW)
    for index, (one, other) in enumerate(zip(together, apart, strict=True)):
        (alone,) = pipe(PROMPTS[index], sampler=sampler, num_steps=3, seed=5 + index)
        assert largest_difference(one, other) <= 1
        assert largest_difference(one, alone) <= 1
    assert largest_difference(together[0], together[4]) > 8  # the same prompt, another seed


def test_seeds(pipe, largest_difference):
    images = pipe(["a red apple", "a blue car"], seed=[3, 3, 9, 4], num_images=2, num_steps=2)
    assert [json.loads(image.info["latentdiff"])["seed"] for image in images] == [3, 3, 9, 4]
    assert largest_difference(images[0], images[1]) <= 1
    assert largest_difference(images[0], images[2]) > 8
    first, second = pipe("a red apple", num_images=2, num_steps=2)  # random seeds
    assert largest_difference(first, second) > 8
    again = pipe("a red apple", seed=json.loads(second.info["latentdiff"])["seed"], num_steps=2)[0]
    assert largest_difference(second, again) <= 1


def test_metadata_reproduces_the_image(pipe, largest_difference):
    settings = {"seed": 11, "num_steps": 3, "guidance_scale": 2.5, "sampler": "dpmpp_2m_sde"}
    (image,) = pipe("a red apple", height=16, width=48, **settings)
    metadata = json.loads(image.info["latentdiff"])
    assert image.size == (48, 16)
    assert largest_difference(image, pipe(metadata.pop("prompt"), **metadata)[0]) == 0


def test_stream_ends_with_the_image(pipe, largest_difference):
    steps = list(pipe.stream(PROMPTS[:2], **FEW))
    assert [step.t for step in steps] == [999, 666, 332]
    assert all(not step.x.requires_grad for step in steps)
    for ours, expected in zip(pipe.decode(steps[-1].x), pipe(PROMPTS[:2], **FEW), strict=True):
        assert largest_difference(ours, expected) == 0


def test_gradients_do_not_leak_out_of_a_stream(pipe):
    """Between steps, the caller can compute gradients."""
    for _ in pipe.stream("a red apple", **FEW):
        assert torch.is_grad_enabled()


def test_guidance(pipe, relative_error):
    """Guidance off is the prompt alone; a negative prompt replaces the empty one; an interval is between off and on."""
    settings = {**FEW, "sampler": "ddim"}

    def latents(prompt="a red apple", **options):
        return pipe.sample_features(pipe.features([prompt], SamplingSettings(**options)), **settings, **options)

    off, on = latents(guidance_scale=1), latents(guidance_scale=5.0)
    assert relative_error(latents(guidance_scale=5.0, negative_prompt="a red apple"), off) < 1e-5
    assert relative_error(on, off) > 0.01
    assert relative_error(latents(guidance_scale=5.0, guidance_interval=(0.0, float("inf"))), on) < 1e-6
    assert relative_error(latents(guidance_scale=5.0, guidance_interval=(1e-9, 1e-8)), off) < 1e-6
    assert relative_error(latents(guidance_scale=5.0, guidance_rescale=0.7), on) > 0.001


def test_weighted_prompts(pipe):
    encode = pipe.text_encoder
    plain, empty = encode(["a red apple"]), encode([""])
    from latentdiff.sampling.prompts import text_features

    assert torch.equal(text_features(encode, ["a (red:1.0) apple"]), plain)
    weighted = text_features(encode, ["a (red:2.0) apple"])
    changed = (weighted != plain).any(2)[0]
    ids = encode.tokenizer("a red apple")["input_ids"]
    places = [index for index, token in enumerate(ids) if encode.tokenizer.decode([token]).strip() == "red"]
    assert changed.nonzero().flatten().tolist() == places
    torch.testing.assert_close(weighted[0, places], (empty + 2 * (plain - empty))[0, places])
    with pytest.raises(LatentDiffError, match="prompt weight"):
        text_features(encode, ["a (red:99) apple"])


def test_img2img(pipe, largest_difference):
    """Low strength stays close to the VAE's reconstruction; strength 1 starts from pure noise."""
    image = picture()
    kept = pipe.decode(pipe.encode(image))[0]
    (weak,) = pipe.img2img("a red apple", image, strength=0.01, num_steps=100, seed=0, guidance_scale=1)
    (strong,) = pipe.img2img("a red apple", image, strength=0.8, num_steps=100, seed=0, guidance_scale=1)
    changes = [np.abs(np.asarray(output).astype(int) - np.asarray(kept)).mean() for output in (weak, strong)]
    assert changes[0] < 0.7 * changes[1]
    (full,) = pipe.img2img("a red apple", image, strength=1.0, num_steps=3, seed=5)
    assert largest_difference(full, pipe("a red apple", **FEW)[0]) <= 1  # zero terminal SNR


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpaint_keeps_what_the_mask_does_not_cover(pipe, sampler):
    image, mask = picture((64, 64)), Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    output = np.asarray(pipe.inpaint("a red apple", image, mask, num_steps=4, seed=1, sampler=sampler)[0]).astype(int)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(output[:, 18:] - expected[:, 18:]).max() <= 1
    assert np.abs(output[:, :14] - expected[:, :14]).mean() > 5


def test_kept_latents_are_exact_at_every_step(pipe):
    """The kept part ends as the image's own latents, exactly, with every sampler."""
    from latentdiff.sampling.loop import InitImage, last

    latents, mask = pipe.encode(picture()), torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    for sampler in SAMPLERS:
        settings = SamplingSettings(num_steps=5, sampler=sampler)
        steps = pipe.steps(pipe.features(["a car"], settings), [0], settings, InitImage(latents, 1.0, mask))
        torch.testing.assert_close(last(steps).x[..., 8:], latents[..., 8:], atol=1e-5, rtol=0)


def test_sizes(pipe):
    assert pipe("a red apple", num_steps=1)[0].size == (32, 32)
    assert pipe("a red apple", num_steps=1, height=64, width=24)[0].size == (24, 64)


def test_an_embedding_can_be_optimized_towards_an_image(pipe):
    """Gradients from pixels through the decoder, all steps and both guided passes to the text features."""
    target = load_images([picture()], (32, 32))
    settings = SamplingSettings(num_steps=3, guidance_scale=2.0)
    features = pipe.features(["a red apple"], settings)
    cond = features.cond.clone().requires_grad_()
    optimizer = torch.optim.Adam([cond], lr=0.5)
    noise = torch.randn(1, 4, 16, 16)
    losses = []
    for _ in range(8):
        latents = pipe.sample_features(features._replace(cond=cond), num_steps=3, guidance_scale=2.0, latents=noise,
                                     enable_grad=True)  # fmt: skip
        loss = (pipe.pixels(latents) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]
    assert not pipe.sample_features(features._replace(cond=cond), num_steps=1).requires_grad


def test_inversion_finds_the_noise(pipe, relative_error):
    """Sampling from the noise that inversion finds gives the image again."""
    settings = SamplingSettings(num_steps=50, guidance_scale=1.0, sampler="ddim")
    inverted = pipe.invert(picture(), "a red apple", num_steps=50)
    features = pipe.features(["a red apple"], settings)
    again = pipe.sample_features(features, num_steps=50, guidance_scale=1.0, sampler="ddim", latents=inverted.latents)
    assert relative_error(again, pipe.encode(picture())) < 0.1
    assert inverted.vae_psnr - inverted.psnr < 1.0
    shown = load_images([inverted.image], (32, 32))
    assert abs(float(psnr(shown, load_images([picture()], (32, 32)))) - inverted.psnr) < 0.2


def test_interpolation(pipe, largest_difference):
    walk = pipe.interpolate("a red apple", "a blue car", 5, seed=[5, 6], num_steps=3)
    assert len(walk) == 5
    assert largest_difference(walk[0], pipe("a red apple", num_steps=3, seed=5)[0]) <= 1
    assert largest_difference(walk[-1], pipe("a blue car", num_steps=3, seed=6)[0]) <= 1
    assert largest_difference(walk[0], walk[2]) > 8 < largest_difference(walk[2], walk[4])
    both = pipe.interpolate((picture(), "a red apple"), picture(seed=1), 3, num_steps=30)
    for end, image in ((both[0], picture()), (both[2], picture(seed=1))):
        kept = pipe.decode(pipe.encode(image))[0]
        assert np.abs(np.asarray(end).astype(int) - np.asarray(kept)).mean() < 12


def test_exaggeration(pipe, largest_difference, relative_error):
    plain = pipe("a red apple", **FEW)[0]
    assert largest_difference(pipe.exaggerate("a red apple", "a green apple", 0.0, **FEW)[0], plain) <= 1
    more = pipe.exaggerate("a red apple", "a green apple", 5.0, **FEW)[0]
    assert largest_difference(more, plain) > 2
    # At guidance 1, adding (feature - prompt) once is the feature's own prediction.
    moved = pipe.exaggerate("a red apple", "a green apple", 1.0, guidance_scale=1.0, **FEW)[0]
    assert largest_difference(moved, pipe("a green apple", guidance_scale=1.0, **FEW)[0]) <= 1
    several = pipe.exaggerate("a red apple", "a green apple", 5.0, num_images=3, batch_size=2, **FEW)
    assert largest_difference(several[0], more) <= 1
    with pytest.raises(LatentDiffError, match="feature=3"):
        pipe.exaggerate("a red apple", 3, 1.0)
    pair = pipe.exaggerate("a blue car", ("a red apple", "a green apple"), 2.0, image=picture(), num_steps=5)
    assert pair[0].size == (32, 32)


def test_slerp_keeps_noise_noise():
    from latentdiff.sampling.editing import slerp

    a, b = torch.randn(1, 4, 32, 32), torch.randn(1, 4, 32, 32)
    assert torch.equal(slerp(a, a, 0.3), a)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    assert 0.95 < float(slerp(a, b, 0.5).std()) < 1.05


def test_settings_and_options_agree():
    assert set(SamplingSettings.model_fields) == set(SamplingOptions.__annotations__)


def test_device_and_dtype(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    half = LatentPipeline.from_pretrained(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert half.unet.conv_in.weight.dtype == torch.bfloat16
    full = pipe("a red apple", num_steps=5, seed=1)[0]
    close = half("a red apple", num_steps=5, seed=1)[0]
    assert np.abs(np.asarray(full).astype(int) - np.asarray(close)).mean() < 10
    assert half.to(dtype=torch.float32).unet.conv_in.weight.dtype == torch.float32
    assert half("a red apple", num_steps=1)[0].size == (32, 32)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, r"prompt=\[\]: expected a string or a list of at least one string"),
        (3, {}, "prompt=3: expected a string"),
        (["a", None], {}, "expected a string or a list"),
        ("a", {"num_steps": 0}, "num_steps=0: expected an integer from 1 to 1000"),
        ("a", {"num_steps": -1}, "num_steps=-1"),
        ("a", {"num_steps": 10**9}, "num_steps=1000000000"),
        ("a", {"num_steps": 2.5}, "num_steps=2.5"),
        ("a", {"guidance_scale": float("nan")}, "guidance_scale=nan: expected a finite number"),
        ("a", {"guidance_scale": "5"}, "guidance_scale='5': expected a number"),
        ("a", {"guidance_rescale": 2.0}, "rescale=2.0: expected a number from 0 to 1"),
        ("a", {"guidance_interval": (3.0, 1.0)}, "expected 0 <= low < high"),
        ("a", {"height": 33}, "height=33: expected a multiple of 2"),
        ("a", {"width": 0}, "width=0"),
        ("a", {"width": 10**6}, "width=1000000"),
        ("a", {"seed": [1, 2]}, "seed has 2 entries for 1 images"),
        ("a", {"seed": -1}, "seed=-1: expected an integer from 0"),
        ("a", {"seed": 1.5}, "seed=1.5"),
        ("a", {"num_images": 0}, "num_images=0"),
        ("a", {"sampler": "dpm"}, "unknown sampler 'dpm': choose one of .*; did you mean 'ddpm'"),
        ("a", {"eta": 0.5}, "only 'ddim' takes an eta"),
        ("a", {"negative_prompt": ["a", "b"]}, "expected one string, or one for each of 1 prompts"),
        ("a", {"negative_prompt": 3}, "negative_prompt=3"),
        ("a", {"negative_prompt": [None]}, r"negative_prompt=\[None\]"),
        ("a", {"guidance_interval": 3}, "guidance_interval=3: expected two numbers"),
        ("a", {"eta": "x"}, "eta='x': expected a number"),
        ("a", {"seed": True}, "seed=True"),
        ("a", {"latents": torch.zeros(2, 4, 16, 16)}, "latents has 2 entries for 1 images"),
        ("a", {"num_step": 3}, "unknown setting 'num_step': .*did you mean 'num_steps'"),
        ("a", {"latents": torch.zeros(1, 4, 3, 3)}, r"latents=\(1, 4, 3, 3\): expected shape \(images, 4, 16, 16\)"),
    ],
)  # fmt: skip
def test_bad_settings(pipe, prompt, options, message):
    with pytest.raises(LatentDiffError, match=message):
        pipe(prompt, **{"num_steps": 2, **options})


def test_a_prompt_of_a_thousand_words_is_truncated_with_a_warning(pipe):
    with pytest.warns(TokenOverflowWarning, match="longer than 16 tokens"):
        assert len(pipe("apple " * 1_000, num_steps=1)) == 1


@pytest.mark.parametrize("strength", [0, -1, 1.5, float("nan"), "much"])
def test_bad_strength(pipe, strength):
    with pytest.raises(LatentDiffError, match="strength="):
        pipe.img2img("a", picture(), strength=strength)


def test_bad_pictures(pipe, tmp_path):
    with pytest.raises(LatentDiffError, match="the mask is 16 x 16 pixels, but the image is 32 x 32"):
        pipe.inpaint("a", picture(), picture((16, 16)))
    with pytest.raises(LatentDiffError, match="image is a NoneType: expected a Pillow image"):
        pipe.img2img("a", None)
    with pytest.raises(LatentDiffError, match="no image given"):
        pipe.encode([])
    with pytest.raises(LatentDiffError, match=r"none.png: cannot be read"):
        pipe.img2img("a", tmp_path / "none.png")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(LatentDiffError, match=r"cut.png: "):
        pipe.invert(tmp_path / "cut.png")


@pytest.mark.parametrize("name", ["nothing-here", "./nothing", "/nothing/at/all"])
def test_no_such_model(name):
    with pytest.raises(LatentDiffError, match="no such folder or file"):
        LatentPipeline.from_pretrained(name)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_never_opened(tmp_path, suffix):
    (tmp_path / f"model{suffix}").write_bytes(b"\x80\x04.")
    with pytest.raises(LatentDiffError, match="pickled weights are never opened"):
        LatentPipeline.from_pretrained(tmp_path / f"model{suffix}")


def test_a_name_on_the_hub_without_network():
    with pytest.raises(LatentDiffError, match="nobody/nothing: no such folder, and it cannot be fetched from the hub"):
        LatentPipeline.from_pretrained("nobody/nothing")


def test_parts_of_different_models(pipe):
    from unet import UNet, UNetConfig

    other = UNet(UNetConfig(block_out_channels=(32,), context_dim=48, norm_groups=8, attention_levels=(0,)))
    with pytest.raises(LatentDiffError, match=r"the text encoder's width .* differ"):
        LatentPipeline(vae=pipe.vae, unet=other, text_encoder=pipe.text_encoder, schedule=pipe.process.schedule)
    with pytest.raises(TextEncoderError, match="not valid Unicode"):
        pipe("\ud800", num_steps=1)


def test_masks_of_any_mode(pipe):
    """Black keeps and white regenerates in every image mode; images are turned as their EXIF says."""
    from latentdiff.sampling.images import load_mask

    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    for mode in ("1", "L", "I", "F", "RGB", "P"):
        found = load_mask(mask.convert(mode), picture(), (32, 32))
        assert (float(found[..., 0].mean()), float(found[..., -1].mean())) == (1.0, 0.0), mode
    turned = picture()
    exif = turned.getexif()
    exif[0x0112] = 3
    turned.info["exif"] = exif.tobytes()
    assert torch.equal(load_images([turned], (32, 32)).flip(2, 3), load_images([picture()], (32, 32)))


def test_a_vae_that_overflows_in_float16_stays_in_float32(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "vae/config.json").read_text()) | {"force_upcast": True}
    (tmp_path / "vae/config.json").write_text(json.dumps(values))
    half = LatentPipeline.from_pretrained(tmp_path, device="cpu", dtype=torch.float32).to(dtype=torch.float16)
    assert half.vae.decoder.conv_in.weight.dtype == torch.float32
    assert half.unet.conv_in.weight.dtype == torch.float16
