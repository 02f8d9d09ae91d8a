"""The loops under LatentPipeline: text features and noise in, previews out."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from unet import UNet

from ..diffusion.guidance import Model, guide, within
from ..diffusion.process import Process, to_x0
from ..diffusion.samplers import Denoise, Step, rows_at, sample, timesteps
from ..errors import LatentDiffError
from ..files.scheduler import PREDICTIONS
from .settings import Recipe

if TYPE_CHECKING:
    from .pipeline import LatentPipeline

Forward = Callable[..., Tensor]  # the UNet, compiled or not
Change = Callable[[Model, Sequence[float], int], Model]  # the model, the grid and the batch to another model
ModelOf = Callable[[Sequence[float]], Model]  # the model for the timesteps of a grid


class Features(NamedTuple):
    """Text features of the pictures to draw, (B, L, D) each."""

    wanted: Tensor
    unwanted: Tensor | None  # None: no guidance

    def part(self, place: slice) -> Features:
        """Some of the pictures."""
        return Features(self.wanted[place], None if self.unwanted is None else self.unwanted[place])


class Noise:
    """Standard normal noise, one stream a picture: (B, c, h, w) however the pictures are batched.

    Drawn on the CPU by torch's generator, as diffusers draws with `torch.Generator().manual_seed(seed)`.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = tuple(shape), device

    def start(self, given: Tensor | None = None) -> Tensor:
        """The first noise, or the one that is given instead."""
        return self.draw() if given is None else given.to(self.device, torch.float32)

    def draw(self) -> Tensor:
        """The next noise of every stream, float32."""
        return torch.stack([torch.randn(self.shape, generator=one) for one in self.generators]).to(self.device)


class Source(NamedTuple):
    """A picture to start from."""

    latents: Tensor  # (1 or B, c, h, w)
    strength: float  # share of the timesteps that are run: 1 starts from pure noise
    mask: Tensor | None = None  # (1, 1, h, w): 1 = draw anew, 0 = keep


def check_strength(strength: float) -> float:
    """Refuse a strength that is not above 0 and up to 1."""
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise LatentDiffError(f"strength={strength!r}: expected a number above 0, up to 1")
    return float(strength)


def network(unet: UNet, forward: Forward, context: Tensor, grid: Sequence[float]) -> Model:
    """The UNet as a function of x (B, c, h, w) and a timestep of the grid, for text features (k B, L, D).

    Keys, values and time embeddings are computed here, once. The prediction is float32, (k B, c, h, w).
    """
    weights = unet.conv_in.weight
    keys = unet.project_context(context.to(weights.dtype))
    shifts = unet.project_time(torch.tensor(grid, device=weights.device))
    place = {t: index for index, t in enumerate(grid)}

    def predict(x: Tensor, t: float) -> Tensor:
        index = place[t]
        copies = x.repeat(len(context) // len(x), 1, 1, 1).to(weights.dtype)
        return forward(copies, [shift[index : index + 1] for shift in shifts], keys).float()

    return predict


def guided_network(
    unet: UNet, forward: Forward, features: Features, recipe: Recipe, process: Process, grid: Sequence[float]
) -> Model:
    """The network with guidance, in all of the process or in an interval of it."""
    if features.unwanted is None:
        return network(unet, forward, features.wanted, grid)
    both = network(unet, forward, torch.cat([features.wanted, features.unwanted]), grid)

    def pair(x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        wanted, unwanted = both(x, t).chunk(2)
        return wanted, unwanted

    guidance = guide(pair, recipe.guidance_scale, rescale=recipe.guidance_rescale)
    if recipe.guidance_interval is None:
        return guidance
    alone = network(unet, forward, features.wanted, grid)
    return within(guidance, alone, *recipe.guidance_interval, process.schedule)


def grid_of(process: Process, recipe: Recipe, strength: float = 1.0) -> list[int]:
    """The timesteps to run, descending: the last `strength` of them, one at least.

    The process decides where they lie, but for `euler` on trailing timesteps, which has a grid of its own.
    """
    spacing = "linspace" if recipe.sampler == "euler" and process.spacing == "trailing" else process.spacing
    grid = timesteps(process.schedule.num_timesteps, recipe.num_steps, spacing, process.offset)
    return grid[len(grid) - max(1, int(len(grid) * strength)) :]


def denoiser(model: Model, process: Process, source: Source | None = None) -> Denoise:
    """The model's x0; where a source's mask keeps the picture, the picture's own.

    With the kept x0 every row takes the kept part exactly to its next noise level: inpainting needs no other step.
    """

    def denoise(x: Tensor, t: int) -> Tensor:
        x0 = to_x0(model(x, t), x, torch.tensor(t), process.prediction, process.schedule)
        return x0 if source is None or source.mask is None else torch.lerp(source.latents, x0, source.mask)

    return denoise


def noisy_start(process: Process, t: int, noise: Tensor, source: Source | None) -> Tensor:
    """x at timestep t: pure noise, or the source's latents noised; of a mask's inside pure noise at strength 1."""
    if source is None:
        return noise
    alpha, sigma = (float(table[t]) for table in (process.schedule.alpha, process.schedule.sigma))
    noised = alpha * source.latents + sigma * noise
    return torch.lerp(noised, noise, source.mask) if source.mask is not None and source.strength == 1 else noised


def draw(
    model_of: ModelOf, process: Process, recipe: Recipe, x: Tensor, noise: Noise, source: Source | None
) -> Iterator[Step]:
    """Run a sampler by name.

    Args:
        model_of: makes the model.
        process: the model's.
        recipe: the settings.
        x: standard normal noise to start from, (B, c, h, w).
        noise: the pictures' streams, for samplers that want more.
        source: a picture to start from.
    """
    grid = grid_of(process, recipe, 1.0 if source is None else source.strength)
    rows = rows_at(recipe.sampler, process.schedule, grid, ends_clean=process.ends_clean, eta=recipe.eta)
    x = noisy_start(process, grid[0], x, source)
    denoise = denoiser(model_of(grid), process, source)
    return sample(denoise, x, rows, lambda _: noise.draw())


def draw_with_scheduler(
    model_of: ModelOf, process: Process, recipe: Recipe, x: Tensor, noise: Noise, source: Source | None
) -> Iterator[Step]:
    """Run a diffusers scheduler object, as `draw`.

    Raises:
        LatentDiffError: it was not built for this model, or cannot do what is asked.
    """
    scheduler = recipe.sampler
    check_scheduler(scheduler, process)
    if source is not None and source.mask is not None:
        raise LatentDiffError("inpainting takes a sampler by name, not a scheduler object: its masking is per step")
    if recipe.eta is not None:
        raise LatentDiffError(f"eta={recipe.eta!r} with a scheduler object: only the sampler 'ddim' takes an eta")
    timesteps(process.schedule.num_timesteps, recipe.num_steps)  # refuses a number out of range
    scheduler.set_timesteps(recipe.num_steps, device=noise.device)
    times = scheduler.timesteps
    if source is None:
        x = x * scheduler.init_noise_sigma
    else:
        skip = recipe.num_steps - max(1, int(recipe.num_steps * source.strength))
        skip *= getattr(scheduler, "order", 1)  # Heun and its like evaluate twice a step
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skip)
        times = times[skip:]
        x = scheduler.add_noise(source.latents.expand_as(x), x, times[:1].expand(len(x)))
    model = model_of(list(dict.fromkeys(times.tolist())))
    extra = {"generator": noise.generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for t in times:
        output = model(scheduler.scale_model_input(x, t), t.item())
        result = scheduler.step(output, t, x, **extra)
        x = result.prev_sample
        yield Step(int(t), x, getattr(result, "pred_original_sample", x))


def check_scheduler(scheduler: Any, process: Process) -> None:
    """Refuse what is no scheduler, and one with other noise levels or another prediction than the model's.

    Raises:
        LatentDiffError: with the way to build the right one.
    """
    if not all(hasattr(scheduler, name) for name in ("set_timesteps", "step", "config", "alphas_cumprod")):
        raise LatentDiffError(f"sampler={scheduler!r:.200}: expected a sampler's name or a diffusers scheduler")
    kind = type(scheduler).__name__
    advice = f"build it with {kind}.from_config(pipe.scheduler_config)"
    if (found := scheduler.config.get("prediction_type")) != (wanted := PREDICTIONS.get(process.prediction)):
        raise LatentDiffError(f"{kind} has prediction_type {found!r} and the model {wanted!r}: {advice}")
    for key in ("clip_sample", "thresholding"):  # for pixels; latents go beyond 1
        if scheduler.config.get(key):
            raise LatentDiffError(f"{kind} has {key}=True, which cuts latents off: {advice}")
    levels = scheduler.alphas_cumprod.double().cpu()
    if levels.shape != process.schedule.alpha_bar.shape or not torch.allclose(
        levels, process.schedule.alpha_bar, atol=1e-4
    ):
        raise LatentDiffError(f"{kind} has other noise levels than the model: {advice}")


def last(steps: Iterator[Step]) -> Step:
    """Run to the end; the steps before are not kept."""
    (step,) = deque(steps, maxlen=1)
    return step


def graph_only_if(wanted: bool, steps: Iterator[Step]) -> Iterator[Step]:
    """The steps, each computed with or without a graph, whatever the caller computes with in between."""
    while True:
        with torch.set_grad_enabled(wanted):
            step = next(steps, None)
        if step is None:
            return
        yield step


def draw_batch(
    pipe: LatentPipeline,
    features: Features,
    seeds: Sequence[int],
    recipe: Recipe,
    source: Source | None = None,
    *,
    first: int = 0,
    change: Change | None = None,
) -> Iterator[Step]:
    """Draw pictures together, yielding after every step; what all methods of the pipeline end in.

    Args:
        pipe: the models.
        features: of each picture.
        seeds: of each picture.
        recipe: the settings.
        source: a picture to start from.
        first: place of the first picture among `recipe.latents`.
        change: makes another model of the guided one.
    """
    shape = pipe.latent_shape(recipe)
    noise = Noise(seeds, shape, pipe.device)
    x = noise.start(recipe.noise(slice(first, first + len(seeds)), shape))
    forward = pipe.unet if recipe.enable_grad else pipe.forward

    def model_of(grid: Sequence[float]) -> Model:
        model = guided_network(pipe.unet, forward, features, recipe, pipe.process, grid)
        return model if change is None else change(model, grid, len(seeds))

    run = draw if isinstance(recipe.sampler, str) else draw_with_scheduler
    with torch.set_grad_enabled(recipe.enable_grad):
        steps = run(model_of, pipe.process, recipe, x, noise, source)
    return graph_only_if(recipe.enable_grad, steps)


def draw_batches(
    pipe: LatentPipeline,
    features: Features,
    seeds: Sequence[int],
    recipe: Recipe,
    source: Source | None = None,
    *,
    change: Change | None = None,
) -> list[Image.Image]:
    """Draw any number of pictures, `recipe.batch_size` at a time; arguments as of `draw_batch`."""
    images: list[Image.Image] = []
    with tqdm(total=len(seeds), unit=" pictures", disable=None if recipe.progress else True) as bar:
        for first in range(0, len(seeds), recipe.batch_size):
            part = slice(first, first + recipe.batch_size)
            steps = draw_batch(pipe, features.part(part), seeds[part], recipe, source, first=first, change=change)
            images += pipe.decode(last(steps).x)
            bar.update(len(seeds[part]))
    return images
