"""The sampling loop: from text features and noise to latents, step by step. No model, VAE or picture is known here.

sample_latents -> samplers.sample -> denoise -> guidance -> CachedNetwork -> the network
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..diffusion.guidance import Model, guide, push, within
from ..diffusion.process import Process, to_x0
from ..diffusion.samplers import Step, rows_at, sample, timesteps
from ..errors import LatentDiffError
from ..files.scheduler import check_scheduler
from .settings import SamplingSettings


class Network(Protocol):
    """What predicts: `unet.UNet`, compiled or not, or something that is called like it."""

    def project_context(self, context: Tensor) -> Any:
        """What the network needs of text features (B, L, D), computed once a picture."""

    def project_time(self, t: Tensor) -> Sequence[Tensor]:
        """What it needs of timesteps (S,), computed once a picture; step i takes row i of each."""

    def __call__(self, x: Tensor, t: Any, context: Any, /) -> Tensor:
        """The prediction at x (B, c, h, w)."""


class Direction(NamedTuple):
    """A feature to exaggerate: the difference of two predictions, added `amount` times."""

    more: Tensor  # (1, L, D) text features with it
    less: Tensor  # (1, L, D) without it
    amount: float


class Features(NamedTuple):
    """Text features of the pictures to sample, (B, L, D) each, in the network's dtype and on its device."""

    wanted: Tensor
    unwanted: Tensor | None  # None: no guidance
    direction: Direction | None = None  # of all pictures

    def part(self, place: slice) -> Features:
        """Some of the pictures."""
        return self._replace(
            wanted=self.wanted[place], unwanted=None if self.unwanted is None else self.unwanted[place]
        )

    def to(self, like: Tensor) -> Features:
        """The same in another tensor's dtype, on its device."""
        unwanted = None if self.unwanted is None else self.unwanted.to(like)
        return self._replace(wanted=self.wanted.to(like), unwanted=unwanted)


class InitImage(NamedTuple):
    """A picture to start from."""

    latents: Tensor  # (1 or B, c, h, w)
    strength: float  # share of the timesteps that are run: 1 starts from pure noise
    mask: Tensor | None = None  # (1, 1, h, w): 1 = sample anew, 0 = keep


class Noise(Protocol):
    """Standard normal noise for the pictures of a batch."""

    def draw(self) -> Tensor:
        """The next noise, (B, c, h, w) float32 on the network's device."""


class SeededNoise:
    """One stream of standard normal noise a picture, the same however the pictures are batched.

    Drawn on the CPU by torch's generator, as diffusers draws with `torch.Generator().manual_seed(seed)`.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = tuple(shape), device

    def draw(self) -> Tensor:
        """The next noise of every stream."""
        return torch.stack([torch.randn(self.shape, generator=one) for one in self.generators]).to(self.device)


class CachedNetwork:
    """The network at the timesteps of a grid; keys, values and time embeddings are computed once, here.

    Args:
        network: predicts.
        context: text features (k B, L, D): every x is repeated k times.
        grid: all timesteps that will be asked for.
    """

    def __init__(self, network: Network, context: Tensor, grid: Sequence[float]) -> None:
        self.network, self.batch, self.dtype = network, len(context), context.dtype
        self.context = network.project_context(context)
        self.times = network.project_time(torch.tensor(grid, device=context.device))
        self.row = {t: index for index, t in enumerate(grid)}

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """The prediction, (k B, c, h, w) float32, at x (B, c, h, w)."""
        row = self.row[t]
        copies = x.repeat(self.batch // len(x), 1, 1, 1).to(self.dtype)
        return self.network(copies, [time[row : row + 1] for time in self.times], self.context).float()

    def pair(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """The two predictions where k is 2."""
        first, second = self(x, t).chunk(2)
        return first, second


def sample_latents(
    network: Network,
    process: Process,
    features: Features,
    settings: SamplingSettings,
    noise: Noise,
    *,
    start: Tensor | None = None,
    init: InitImage | None = None,
) -> Iterator[Step]:
    """Sample pictures together, yielding after every step; the last step's `x` is the result.

    Args:
        network: predicts.
        process: what its predictions mean.
        features: of each picture.
        settings: how to sample.
        noise: of the pictures; a diffusers scheduler that draws noise of its own uses its `generators`.
        start: standard normal noise (B, c, h, w) to begin with instead of the first of `noise`.
        init: a picture to start from.

    Raises:
        LatentDiffError: a setting is out of range, or a scheduler object does not match the model.
    """
    x = noise.draw() if start is None else start
    if not isinstance(settings.sampler, str):
        yield from _sample_with_scheduler(network, process, features, settings, noise, x, init)
        return
    grid = timestep_grid(process, settings, 1.0 if init is None else init.strength)
    rows = rows_at(settings.sampler, process.schedule, grid,
                   final_sigma_zero=process.final_sigma_zero, eta=settings.eta)  # fmt: skip
    model = guided_model(network, process, features, settings, grid)
    x = noisy_start(process, grid[0], x, init)
    yield from sample(partial(denoise, model, process, init), x, rows, lambda _: noise.draw())


def timestep_grid(process: Process, settings: SamplingSettings, strength: float = 1.0) -> list[int]:
    """The timesteps to run, descending: the last `strength` of them, one at least.

    The process decides where they lie, but for `euler` on trailing timesteps, which has a grid of its own.
    """
    spacing = "linspace" if settings.sampler == "euler" and process.spacing == "trailing" else process.spacing
    grid = timesteps(process.schedule.num_timesteps, settings.num_steps, spacing, process.offset)
    return grid[len(grid) - max(1, int(len(grid) * strength)) :]


def guided_model(
    network: Network, process: Process, features: Features, settings: SamplingSettings, grid: Sequence[float]
) -> Model:
    """The network with its features: with guidance in all of the process or in an interval, and with a direction."""
    model: Model
    if features.unwanted is None:
        model = CachedNetwork(network, features.wanted, grid)
    else:
        both = CachedNetwork(network, torch.cat([features.wanted, features.unwanted]), grid)
        model = guide(both.pair, settings.guidance_scale, rescale=settings.guidance_rescale)
        if settings.guidance_interval is not None:
            unguided = CachedNetwork(network, features.wanted, grid)
            model = within(model, unguided, *settings.guidance_interval, process.schedule)
    if features.direction is not None:
        more, less, amount = features.direction
        ends = [end.to(features.wanted).expand_as(features.wanted) for end in (more, less)]
        model = push(model, CachedNetwork(network, torch.cat(ends), grid).pair, amount)
    return model


def denoise(model: Model, process: Process, init: InitImage | None, x: Tensor, t: int) -> Tensor:
    """The model's x0; where an initial picture's mask keeps the picture, the picture's own.

    With the kept x0 every row takes the kept part exactly to its next noise level: inpainting needs no other step.
    """
    x0 = to_x0(model(x, t), x, torch.tensor(t), process.prediction, process.schedule)
    return x0 if init is None or init.mask is None else torch.lerp(init.latents, x0, init.mask)


def noisy_start(process: Process, t: int, noise: Tensor, init: InitImage | None) -> Tensor:
    """x at timestep t: pure noise, or the picture's latents noised; of a mask's inside pure noise at strength 1."""
    if init is None:
        return noise
    alpha, sigma = (float(table[t]) for table in (process.schedule.alpha, process.schedule.sigma))
    noised = alpha * init.latents + sigma * noise
    return torch.lerp(noised, noise, init.mask) if init.mask is not None and init.strength == 1 else noised


def last(steps: Iterator[Step]) -> Step:
    """Run to the end; the steps before are not kept."""
    (step,) = deque(steps, maxlen=1)
    return step


def _sample_with_scheduler(
    network: Network,
    process: Process,
    features: Features,
    settings: SamplingSettings,
    noise: Noise,
    x: Tensor,
    init: InitImage | None,
) -> Iterator[Step]:
    """`sample_latents` with a diffusers scheduler object."""
    scheduler = settings.sampler
    check_scheduler(scheduler, process)
    if init is not None and init.mask is not None:
        raise LatentDiffError("inpainting takes a sampler by name, not a scheduler object: its masking is per step")
    if settings.eta is not None:
        raise LatentDiffError(f"eta={settings.eta!r} with a scheduler object: only the sampler 'ddim' takes an eta")
    timesteps(process.schedule.num_timesteps, settings.num_steps)  # refuses a number out of range
    scheduler.set_timesteps(settings.num_steps, device=x.device)
    times = scheduler.timesteps
    if init is None:
        x = x * scheduler.init_noise_sigma
    else:
        skip = settings.num_steps - max(1, int(settings.num_steps * init.strength))
        skip *= getattr(scheduler, "order", 1)  # Heun and its like evaluate twice a step
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skip)
        times = times[skip:]
        x = scheduler.add_noise(init.latents.expand_as(x), x, times[:1].expand(len(x)))
    model: Any = guided_model(network, process, features, settings, list(dict.fromkeys(times.tolist())))
    draws_noise = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": getattr(noise, "generators", None)} if draws_noise else {}
    for t in times:
        output = model(scheduler.scale_model_input(x, t), t.item())
        result = scheduler.step(output, t, x, **extra)
        x = result.prev_sample
        yield Step(int(t), x, getattr(result, "pred_original_sample", x))
