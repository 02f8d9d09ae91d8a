"""What else a generative model can do: start from a picture, find its noise, walk between two, exaggerate a feature."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..errors import LatentDiffError
from ..evaluation.metrics import psnr
from .images import Picture, load_images, load_mask
from .inversion import invert_latents
from .loop import Direction, Features, InitImage, SeededNoise, last
from .parts import ModelParts
from .prompts import as_list, text_features
from .settings import SamplingOptions, SamplingSettings


class Inversion(NamedTuple):
    """The noise that gives a picture."""

    latents: Tensor  # (1, c, h, w): pass it as `latents=` with sampler="ddim", the same steps, prompt and guidance
    image: Image.Image  # what is sampled from it
    psnr: float  # of that picture against the given one, dB
    vae_psnr: float  # the same for the VAE alone, encoded and decoded: the most that can be reached, about


def init_image(parts: ModelParts, image: Picture, strength: float, settings: SamplingSettings) -> InitImage:
    """A picture to start from, as large as the settings ask for.

    Raises:
        LatentDiffError: the strength is not above 0 and up to 1, or the picture cannot be read.
    """
    return InitImage(parts.encode(image, size=parts.pixel_size(settings)), check_strength(strength))


def masked_image(
    parts: ModelParts, image: Picture, mask: Picture, strength: float, settings: SamplingSettings
) -> tuple[InitImage, Tensor, Tensor]:
    """The same with a mask; and pixels (1, 3, H, W) and mask (1, 1, H, W) in full size, to paste the result.

    Raises:
        LatentDiffError: as `init_image`, or the mask's size is not the picture's.
    """
    size = parts.pixel_size(settings)
    pixels, whole = load_images([image], size), load_mask(mask, image, size)
    latents = parts.latents_of(pixels)
    small = F.adaptive_max_pool2d(whole, latents.shape[-2:]).to(parts.device)
    return InitImage(latents, check_strength(strength), small), pixels, whole


def check_strength(strength: float) -> float:
    """The strength, if it is above 0 and up to 1."""
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise LatentDiffError(f"strength={strength!r}: expected a number above 0, up to 1")
    return float(strength)


def invert(parts: ModelParts, image: Picture, prompt: str, num_steps: int, guidance_scale: float) -> Inversion:
    """Run `ddim` backwards from a picture to noise, then forwards to see how well: `LatentPipeline.invert`."""
    settings = SamplingSettings(num_steps=num_steps, guidance_scale=guidance_scale, sampler="ddim", seed=0)
    pixels = load_images([image], (parts.image_size, parts.image_size))
    latents = parts.latents_of(pixels)
    with torch.no_grad():
        features = parts.features(as_list(prompt), settings)
        noise = _invert(parts, latents, features, settings)
        steps = parts.steps(features, [0], settings.model_copy(update={"latents": noise}))
        sampled = last(steps).x
        again, vae_alone = (parts.pixels(one).cpu() for one in (sampled, latents))
    return Inversion(noise, parts.decode(sampled)[0], float(psnr(pixels, again)), float(psnr(pixels, vae_alone)))


def interpolate(parts: ModelParts, a: Any, b: Any, n: int, options: SamplingOptions) -> list[Image.Image]:
    """Walk from one end to the other, in noise and in text features at once: `LatentPipeline.interpolate`."""
    if not isinstance(n, int) or isinstance(n, bool) or n < 2:
        raise LatentDiffError(f"n={n!r}: expected a whole number from 2 up, both ends included")
    ends = [_as_end(end) for end in (a, b)]
    if any(picture is not None for picture, _ in ends):
        options = {"guidance_scale": 1.0, **options, "sampler": "ddim"}
    settings = SamplingSettings.of({**options, "num_images": 1})
    seeds = settings.seeds(2) if isinstance(settings.seed, list | tuple | range) else settings.seeds(1) * 2
    features = parts.features([prompt for _, prompt in ends], settings)
    noises = [
        _noise_of(parts, picture, seed, features.part(slice(place, place + 1)), settings)
        for place, ((picture, _), seed) in enumerate(zip(ends, seeds, strict=True))
    ]
    shares = torch.linspace(0, 1, n).tolist()
    start = torch.cat([slerp(noises[0], noises[1], share) for share in shares])
    wanted, unwanted = (
        None if both is None else torch.cat([slerp(both[:1], both[1:], share) for share in shares])
        for both in (features.wanted, features.unwanted)
    )
    assert wanted is not None
    walk = SamplingSettings.of({**options, "latents": start})
    return parts.sample_images(Features(wanted, unwanted), [seeds[0]] * n, walk)


def exaggerate(
    parts: ModelParts,
    prompt: str,
    feature: str | tuple[str, str],
    amount: float,
    image: Picture | None,
    options: SamplingOptions,
) -> list[Image.Image]:
    """At every step the prediction moves along the difference of two others: `LatentPipeline.exaggerate`."""
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not -1e3 < amount < 1e3:
        raise LatentDiffError(f"amount={amount!r}: expected a number between -1000 and 1000")
    pair = (prompt, feature) if isinstance(feature, str) else feature
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise LatentDiffError(f"prompt={prompt!r}, feature={feature!r}: expected strings, or a pair (without, with)")
    if image is not None:
        options = {"guidance_scale": 1.0, **options, "sampler": "ddim"}
    settings = SamplingSettings.of(options)
    features = parts.features(as_list(prompt), settings)
    if image is not None:
        noise = _noise_of(parts, image, 0, features.part(slice(1)), settings)
        settings = SamplingSettings.of({**options, "latents": noise.repeat(len(features.wanted), 1, 1, 1)})
    without, with_feature = pair
    with torch.set_grad_enabled(settings.enable_grad):
        more, less = torch.split(text_features(parts.text_encoder, [with_feature, without]), 1)
    features = features._replace(direction=Direction(more, less, amount))
    return parts.sample_images(features, settings.seeds(len(features.wanted)), settings)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Between a (1, ...) and b on the arc between their directions, the norm going evenly from one to the other.

    Noise stays noise: the straight line's middle would be too short by a factor of the square root of 2.
    """
    shape, dtype = a.shape, a.dtype
    a, b = a.flatten(1).double(), b.flatten(1).double()
    a_norm, b_norm = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    u, v = a / a_norm.clamp(min=1e-12), b / b_norm.clamp(min=1e-12)
    angle = (u * v).sum(1, keepdim=True).clamp(-1, 1).acos()
    if bool((angle < 1e-6).any()):  # the same direction: the arc is a line
        return torch.lerp(a, b, share).view(shape).to(dtype)
    arc = (((1 - share) * angle).sin() * u + (share * angle).sin() * v) / angle.sin()
    return (arc * torch.lerp(a_norm, b_norm, share)).view(shape).to(dtype)


def _as_end(end: Any) -> tuple[Any, str]:
    """A picture or None, and a prompt."""
    if isinstance(end, str):
        return None, end
    if isinstance(end, tuple) and len(end) == 2 and isinstance(end[1], str):
        return end[0], end[1]
    if end is None:
        raise LatentDiffError("an end is None: expected a prompt, a picture, or a pair (picture, prompt)")
    return end, ""


def _noise_of(
    parts: ModelParts, picture: Picture | None, seed: int, features: Features, settings: SamplingSettings
) -> Tensor:
    """The noise (1, c, h, w) of a picture, or of a seed where there is none."""
    if picture is None:
        return SeededNoise([seed], parts.latent_shape(settings), parts.device).draw()
    return _invert(parts, parts.encode(picture, size=parts.pixel_size(settings)), features, settings)


def _invert(parts: ModelParts, latents: Tensor, features: Features, settings: SamplingSettings) -> Tensor:
    return invert_latents(parts.unet, parts.process, features.to(parts.unet.conv_in.weight), settings, latents)
