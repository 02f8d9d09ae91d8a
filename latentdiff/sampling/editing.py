"""Image editing: start from an image, invert it to noise, interpolate between two, exaggerate a feature."""

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
    """The noise from which an image is sampled, and how well."""

    latents: Tensor  # noise (1, c, h, w); pass it as `latents` with sampler="ddim", the same steps, prompt, guidance
    image: Image.Image  # the image sampled from that noise
    psnr: float  # PSNR of that image against the original, in dB
    vae_psnr: float  # PSNR of the VAE's reconstruction, in dB: roughly the upper limit


def init_image(parts: ModelParts, image: Picture, strength: float, settings: SamplingSettings) -> InitImage:
    """Encode an image to start from, at the size that the settings ask for."""
    if isinstance(image, list | tuple):
        raise LatentDiffError(f"{len(image)} images to start from: expected one; call it for each")
    return InitImage(parts.encode(image, size=parts.pixel_size(settings)), check_strength(strength))


def masked_image(
    parts: ModelParts, image: Picture, mask: Picture, strength: float, settings: SamplingSettings
) -> tuple[InitImage, Tensor, Tensor]:
    """Encode an image and its mask; also return pixels (1, 3, H, W) and mask (1, 1, H, W) for pasting the result."""
    size = parts.pixel_size(settings)
    pixels, pixel_mask = load_images([image], size), load_mask(mask, image, size)
    latents = parts.latents_of(pixels)
    latent_mask = F.adaptive_max_pool2d(pixel_mask, latents.shape[-2:]).to(parts.device)
    return InitImage(latents, check_strength(strength), latent_mask), pixels, pixel_mask


def check_strength(strength: float) -> float:
    """Return the strength as a float; raise LatentDiffError unless it is above 0 and at most 1."""
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise LatentDiffError(f"strength={strength!r}: expected a number above 0 and at most 1")
    return float(strength)


def invert(parts: ModelParts, image: Picture, prompt: str, num_steps: int, guidance_scale: float) -> Inversion:
    """Implement `LatentPipeline.invert`."""
    settings = SamplingSettings(num_steps=num_steps, guidance_scale=guidance_scale, sampler="ddim", seed=0)
    pixels = load_images([image], (parts.image_size, parts.image_size))
    latents = parts.latents_of(pixels)
    with torch.no_grad():
        features = parts.features(as_list(prompt), settings)
        noise = _invert(parts, latents, features, settings)
        steps = parts.steps(features, [0], settings.model_copy(update={"latents": noise}))
        sampled = last(steps).x
        resampled, reconstructed = (parts.pixels(x).cpu() for x in (sampled, latents))
    return Inversion(
        noise, parts.decode(sampled)[0], float(psnr(pixels, resampled)), float(psnr(pixels, reconstructed))
    )


def interpolate(parts: ModelParts, a: Any, b: Any, n: int, options: SamplingOptions) -> list[Image.Image]:
    """Implement `LatentPipeline.interpolate`."""
    if not isinstance(n, int) or isinstance(n, bool) or n < 2:
        raise LatentDiffError(f"n={n!r}: expected an integer of at least 2, for both endpoints")
    endpoints = [_parse_endpoint(endpoint) for endpoint in (a, b)]
    if any(image is not None for image, _ in endpoints):
        options = {"guidance_scale": 1.0, **options, "sampler": "ddim"}
    settings = SamplingSettings.of({**options, "num_images": 1})
    seeds = settings.seeds(2) if isinstance(settings.seed, list | tuple | range) else settings.seeds(1) * 2
    features = parts.features([prompt for _, prompt in endpoints], settings)
    noises = [
        _noise_of(parts, image, seed, features.part(slice(index, index + 1)), settings)
        for index, ((image, _), seed) in enumerate(zip(endpoints, seeds, strict=True))
    ]
    weights = torch.linspace(0, 1, n).tolist()
    start = torch.cat([slerp(noises[0], noises[1], weight) for weight in weights])
    cond, uncond = (
        None if pair is None else torch.cat([slerp(pair[:1], pair[1:], weight) for weight in weights])
        for pair in (features.cond, features.uncond)
    )
    assert cond is not None
    settings = SamplingSettings.of({**options, "latents": start})
    return list(parts.sample_images(Features(cond, uncond), [seeds[0]] * n, settings))


def exaggerate(
    parts: ModelParts,
    prompt: str,
    feature: str | tuple[str, str],
    amount: float,
    image: Picture | None,
    options: SamplingOptions,
) -> list[Image.Image]:
    """Implement `LatentPipeline.exaggerate`."""
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not -1e3 < amount < 1e3:
        raise LatentDiffError(f"amount={amount!r}: expected a number between -1000 and 1000")
    pair = (prompt, feature) if isinstance(feature, str) else feature
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise LatentDiffError(
            f"prompt={prompt!r}, feature={feature!r}: expected strings; feature may be a pair (without, with)"
        )
    if image is not None:
        options = {"guidance_scale": 1.0, **options, "sampler": "ddim"}
    settings = SamplingSettings.of(options)
    features = parts.features(as_list(prompt), settings)
    if image is not None:
        noise = _noise_of(parts, image, 0, features.part(slice(1)), settings)
        settings = SamplingSettings.of({**options, "latents": noise.repeat(len(features.cond), 1, 1, 1)})
    without, with_feature = pair
    with torch.set_grad_enabled(settings.enable_grad):
        more, less = torch.split(text_features(parts.text_encoder, [with_feature, without]), 1)
    features = features._replace(direction=Direction(more, less, amount))
    return list(parts.sample_images(features, settings.seeds(len(features.cond)), settings))


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolate the directions of a (1, ...) and b spherically and their norms linearly; noise keeps its variance."""
    shape, dtype = a.shape, a.dtype
    a, b = a.flatten(1).double(), b.flatten(1).double()
    a_norm, b_norm = a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True)
    u, v = a / a_norm.clamp(min=1e-12), b / b_norm.clamp(min=1e-12)
    angle = (u * v).sum(1, keepdim=True).clamp(-1, 1).acos()
    if bool((angle < 1e-6).any()):  # same direction: the arc is a straight line
        return torch.lerp(a, b, weight).view(shape).to(dtype)
    arc = (((1 - weight) * angle).sin() * u + (weight * angle).sin() * v) / angle.sin()
    return (arc * torch.lerp(a_norm, b_norm, weight)).view(shape).to(dtype)


def _parse_endpoint(endpoint: Any) -> tuple[Any, str]:
    """Return an image or None, and a prompt."""
    if isinstance(endpoint, str):
        return None, endpoint
    if isinstance(endpoint, tuple) and len(endpoint) == 2 and isinstance(endpoint[1], str):
        return endpoint[0], endpoint[1]
    if endpoint is None:
        raise LatentDiffError("an endpoint is None: expected a prompt, an image, or a pair (image, prompt)")
    return endpoint, ""


def _noise_of(
    parts: ModelParts, image: Picture | None, seed: int, features: Features, settings: SamplingSettings
) -> Tensor:
    """Invert an image to noise (1, c, h, w), or draw noise from the seed if there is none."""
    if image is None:
        return SeededNoise([seed], parts.latent_shape(settings), parts.device).draw()
    return _invert(parts, parts.encode(image, size=parts.pixel_size(settings)), features, settings)


def _invert(parts: ModelParts, latents: Tensor, features: Features, settings: SamplingSettings) -> Tensor:
    return invert_latents(parts.unet, parts.process, features.to(parts.unet.conv_in.weight), settings, latents)
