"""What else a generative model can do: find the noise of a picture, walk between two, exaggerate a feature."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import torch
from PIL import Image
from torch import Tensor

from ..diffusion.guidance import Model
from ..diffusion.samplers import rows_at
from ..errors import LatentDiffError
from ..evaluation.metrics import psnr
from .images import Picture, load_images
from .loop import Features, Noise, denoiser, draw_batches, grid_of, guided_network, network
from .prompts import as_list, text_features
from .settings import Options, Recipe

if TYPE_CHECKING:
    from .pipeline import LatentPipeline

ROUNDS = 3  # of the fixed-point iteration of each inverted step


class Inversion(NamedTuple):
    """The noise that draws a picture."""

    latents: Tensor  # (1, c, h, w): pass it as `latents=` with sampler="ddim", the same steps, prompt and guidance
    image: Image.Image  # what is drawn from it
    psnr: float  # of that picture against the given one, dB
    vae_psnr: float  # the same for the VAE alone, encoded and decoded: the most that can be reached, about


def invert(
    pipe: LatentPipeline, image: Picture, prompt: str, *, num_steps: int = 100, guidance_scale: float = 1.0
) -> Inversion:
    """Run `ddim` backwards from a picture to noise (arXiv 2105.05233, appendix F), then forwards to see how well.

    Each step is solved for its starting point by fixed-point iteration, so that the way back undoes it.

    Args:
        pipe: the model.
        image: Pillow picture or file; cut and resized to the model's size.
        prompt: the picture's caption, or nothing.
        num_steps: more lose less.
        guidance_scale: 1 is off; guidance makes the way back less sure.

    Raises:
        LatentDiffError: the picture cannot be read, or a number is out of range.
    """
    recipe = Recipe(num_steps=num_steps, guidance_scale=guidance_scale, sampler="ddim", progress=False)
    pixels = load_images([image], (pipe.image_size, pipe.image_size))
    latents = pipe.latents_of(pixels)
    with torch.no_grad():
        features = pipe.features(as_list(prompt), recipe)
        noise = _invert(pipe, latents, features, recipe)
        drawn = pipe.draw_features(features, num_steps=num_steps, guidance_scale=guidance_scale, sampler="ddim",
                                   latents=noise)  # fmt: skip
        again, vae_alone = (pipe.pixels(one).cpu() for one in (drawn, latents))
    return Inversion(noise, pipe.decode(drawn)[0], float(psnr(pixels, again)), float(psnr(pixels, vae_alone)))


def interpolate(pipe: LatentPipeline, a: Any, b: Any, n: int, **options: Unpack[Options]) -> list[Image.Image]:
    """Walk from one end to the other, in noise and in text features at once.

    Args:
        pipe: the model.
        a: a prompt, a picture, or a pair (picture, prompt). A picture is inverted first, by `ddim`.
        b: the other end.
        n: pictures, both ends included; from 2 up.
        options: as in a call. With one `seed` both prompts start from the same noise, with two each from its own.

    Raises:
        LatentDiffError: a setting is out of range.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 2:
        raise LatentDiffError(f"n={n!r}: expected a whole number from 2 up, both ends included")
    ends = [_as_end(end) for end in (a, b)]
    if any(picture is not None for picture, _ in ends):
        options = {"guidance_scale": 1.0, **options, "sampler": "ddim"}
    recipe = Recipe.of({**options, "num_images": 1})
    seeds = recipe.seeds(2) if isinstance(recipe.seed, list | tuple | range) else recipe.seeds(1) * 2
    features = pipe.features([prompt for _, prompt in ends], recipe)
    shape = pipe.latent_shape(recipe)
    noises = [
        Noise([seed], shape, pipe.device).draw() if picture is None
        else _invert(pipe, pipe.encode(picture, size=pipe.pixel_size(recipe)), features.part(place), recipe)
        for (picture, _), seed, place in zip(ends, seeds, (slice(1), slice(1, 2)), strict=True)
    ]  # fmt: skip
    shares = torch.linspace(0, 1, n).tolist()
    wanted, unwanted = (
        None if feature is None else torch.cat([slerp(feature[:1], feature[1:], share) for share in shares])
        for feature in features
    )
    assert wanted is not None
    start = torch.cat([slerp(noises[0], noises[1], share) for share in shares])
    return draw_batches(pipe, Features(wanted, unwanted), [seeds[0]] * n, Recipe.of({**options, "latents": start}))


def exaggerate(
    pipe: LatentPipeline,
    prompt: str,
    feature: str | tuple[str, str],
    amount: float,
    *,
    image: Picture | None = None,
    **options: Unpack[Options],
) -> list[Image.Image]:
    """Draw a prompt with a feature exaggerated: at every step the prediction moves along the difference of two others.

    Args:
        pipe: the model.
        prompt: what to draw, "a noto emoji of a face".
        feature: the same with the feature, "a noto emoji of a smiling face"; or a pair (without, with).
        amount: 0 changes nothing, 1 adds the difference once, negative numbers take away.
        image: start from this picture's noise, found by `invert` with the prompt, instead of the seed's.
        options: as in a call; with an image the sampler is `ddim`, and guidance is off unless given.

    Raises:
        LatentDiffError: a setting is out of range.
    """
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not -1e3 < amount < 1e3:
        raise LatentDiffError(f"amount={amount!r}: expected a number between -1000 and 1000")
    pair = (prompt, feature) if isinstance(feature, str) else feature
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise LatentDiffError(f"prompt={prompt!r}, feature={feature!r}: expected strings, or a pair (without, with)")
    if image is not None:
        options = {"guidance_scale": 1.0, **options, "sampler": "ddim"}
    recipe = Recipe.of(options)
    features = pipe.features(as_list(prompt), recipe)
    if image is not None:
        latents = pipe.encode(image, size=pipe.pixel_size(recipe))
        inverted = _invert(pipe, latents, features.part(slice(1)), recipe)
        recipe = Recipe.of({**options, "latents": inverted.repeat(len(features.wanted), 1, 1, 1)})
    without, with_feature = pair
    with torch.set_grad_enabled(recipe.enable_grad):
        ends = text_features(pipe.text_encoder, [with_feature, without])

    def direction(model: Model, grid: Any, count: int) -> Model:
        predict = network(pipe.unet, pipe.unet, ends.repeat_interleave(count, 0), grid)

        def moved(x: Tensor, t: int) -> Tensor:
            more, less = predict(x, t).chunk(2)
            return model(x, t) + amount * (more - less)

        return moved

    return draw_batches(pipe, features, recipe.seeds(len(features.wanted)), recipe, change=direction)


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


@torch.no_grad()
def _invert(pipe: LatentPipeline, latents: Tensor, features: Features, recipe: Recipe) -> Tensor:
    """The noise at the first timestep that `ddim` takes to these latents."""
    process = pipe.process
    grid = grid_of(process, recipe)
    model = guided_network(pipe.unet, pipe.unet, features, recipe, process, grid)
    denoise = denoiser(model, process)
    rows = rows_at("ddim", process.schedule, grid, ends_clean=process.ends_clean)
    alpha, sigma = process.schedule.alpha.tolist(), process.schedule.sigma.tolist()
    x, below = latents, (1.0, 0.0) if process.ends_clean else (alpha[0], sigma[0])
    for t, a, b, _, _ in reversed(rows):
        end, x = x, x  # solve end = a x + b x0(x) for x
        for _ in range(ROUNDS):
            x0 = denoise(x, t)
            if a > 0.5 or below[0] <= below[1]:
                x = (end - b * x0) / a
            else:  # in terms of the noise, which hardly changes where x0 decides everything
                noise = (x - alpha[t] * x0) / sigma[t]
                x = (alpha[t] * end + (sigma[t] * below[0] - alpha[t] * below[1]) * noise) / below[0]
        below = (alpha[t], sigma[t])
    return x
