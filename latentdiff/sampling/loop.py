"""The sampling loop: from text features and noise to latents, step by step. It knows neither the VAE nor images.

sample_latents -> samplers.sample -> denoise -> guidance -> CachedNetwork -> network
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..diffusion.guidance import Model, guide, steer, within
from ..diffusion.process import Process
from ..diffusion.samplers import Step, rows_at, sample, timesteps
from ..errors import LatentDiffError
from ..files.scheduler import check_scheduler
from .settings import SamplingSettings


class Network(Protocol):
    """The denoising network: `unet.UNet`, compiled or not, or anything that is called like it."""

    def project_context(self, context: Tensor) -> Any:
        """Precompute what the network needs of text features (B, L, D), once per image."""

    def project_time(self, t: Tensor) -> Sequence[Tensor]:
        """Precompute what it needs of timesteps (S,), once per image; step i uses row i of each tensor."""

    def start_history(self) -> Any:
        """Return what to pass on from step to step of a trajectory; None if the network looks at no other step."""

    def __call__(self, x: Tensor, t: Any, context: Any, history: Any = None, /) -> Any:
        """Return the prediction at x (B, c, h, w), and with a history a pair: that, and the next step's history."""


class Direction(NamedTuple):
    """A feature to exaggerate: the difference of two predictions, added `amount` times."""

    more: Tensor  # text features with the feature, (1, L, D)
    less: Tensor  # text features without it, (1, L, D)
    amount: float


class Features(NamedTuple):
    """Text features of the images to sample, (B, L, D) each."""

    cond: Tensor  # of the prompts
    uncond: Tensor | None  # of the negative prompts; None: no guidance
    direction: Direction | None = None  # shared by all images

    def part(self, index: slice) -> Features:
        """Return the features of some of the images."""
        return self._replace(cond=self.cond[index], uncond=None if self.uncond is None else self.uncond[index])

    def to(self, like: Tensor) -> Features:
        """Return the features in the dtype and on the device of `like`."""
        uncond = None if self.uncond is None else self.uncond.to(like)
        return self._replace(cond=self.cond.to(like), uncond=uncond)


class InitImage(NamedTuple):
    """An image to start from."""

    latents: Tensor  # (1 or B, c, h, w)
    strength: float  # fraction of the timesteps to run: 1 starts from pure noise
    mask: Tensor | None = None  # (1, 1, h, w): 1 = sample, 0 = keep


class Noise(Protocol):
    """Standard normal noise for the images of a batch."""

    def draw(self) -> Tensor:
        """Return the next noise, (B, c, h, w) in float32 on the network's device."""


class SeededNoise:
    """One stream of noise per image, independent of batching; drawn on the CPU, as in diffusers with CPU generators."""

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = tuple(shape), device

    def draw(self) -> Tensor:
        """Return the next noise of every stream."""
        noise = torch.stack(
            [torch.randn(self.shape, generator=generator, dtype=torch.float32) for generator in self.generators]
        )
        if self.device.type == "cuda":
            noise = noise.pin_memory()  # otherwise the host would wait for all that came before
        return noise.to(self.device, non_blocking=True)


class CachedNetwork:
    """The network on a grid of timesteps, with time embeddings and projections of the context (k B, L, D) cached.

    With `along_trajectory`, every call is the next step of the same pictures, and a network that looks at earlier steps
    sees them; else each call stands alone.
    """

    def __init__(
        self, network: Network, context: Tensor, grid: Sequence[float], *, along_trajectory: bool = False
    ) -> None:
        self.network, self.batch, self.dtype = network, len(context), context.dtype
        self.context = network.project_context(context)
        self.times = network.project_time(torch.tensor(grid, device=context.device))
        self.row = {t: index for index, t in enumerate(grid)}
        self.history = network.start_history() if along_trajectory else None

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Return k predictions per image at x (B, c, h, w): (k B, c, h, w), float32."""
        row = self.row[t]
        copies = x.repeat(self.batch // len(x), 1, 1, 1).to(self.dtype)
        inputs = copies, [time[row : row + 1] for time in self.times], self.context
        if self.history is None:
            return self.network(*inputs).float()
        output, self.history = self.network(*inputs, self.history)
        return output.float()

    def pair(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Return both predictions, for k = 2."""
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
    """Sample a batch of images, yielding after every step; the last step's `x` is the result.

    `start` is the initial standard normal noise (B, c, h, w), by default the first of `noise`; `init` is an image to
    start from. A diffusers scheduler that adds noise uses the `generators` of `noise`. Raises LatentDiffError on a
    setting out of range, or a scheduler object that does not match the model.
    """
    x = noise.draw() if start is None else start
    if not isinstance(settings.sampler, str):
        yield from _sample_with_scheduler(network, process, features, settings, noise, x, init)
        return
    grid = timestep_grid(process, settings, 1.0 if init is None else init.strength)
    rows = rows_at(settings.sampler, process.schedule, grid,
                   final_sigma_zero=process.final_sigma_zero, eta=settings.eta)  # fmt: skip
    model = guided_model(network, process, features, settings, grid, along_trajectory=True)
    x = noisy_start(process, grid[0], x, init)
    yield from sample(partial(denoise, model, process, init), x, rows, lambda _: noise.draw())


def timestep_grid(process: Process, settings: SamplingSettings, strength: float = 1.0) -> list[int]:
    """Return the timesteps to run in descending order: the last fraction `strength` of the grid, at least one."""
    # `euler` has a linspace grid of its own, unless the model requires a spacing other than the default.
    spacing = "linspace" if settings.sampler == "euler" and process.spacing == "trailing" else process.spacing
    grid = timesteps(process.schedule.num_timesteps, settings.num_steps, spacing, process.offset)
    return grid[len(grid) - max(1, int(len(grid) * strength)) :]


def guided_model(
    network: Network, process: Process, features: Features, settings: SamplingSettings, grid: Sequence[float],
    *, along_trajectory: bool = False,
) -> Model:  # fmt: skip
    """Wrap the network with its text features, guidance (everywhere or in an interval) and direction."""
    cached = partial(CachedNetwork, network, grid=grid, along_trajectory=along_trajectory)
    model: Model
    if features.uncond is None:
        model = cached(features.cond)
    else:
        both = cached(torch.cat([features.cond, features.uncond]))
        model = guide(both.pair, settings.guidance_scale, rescale=settings.guidance_rescale)
        if settings.guidance_interval is not None:
            # What has a history goes on with both predictions outside the interval, where it uses one.
            unguided = cached(features.cond) if both.history is None else lambda x, t: both.pair(x, t)[0]
            model = within(model, unguided, *settings.guidance_interval, process.schedule)
    if features.direction is not None:
        more, less, amount = features.direction
        contexts = [context.to(features.cond).expand_as(features.cond) for context in (more, less)]
        model = steer(model, cached(torch.cat(contexts)).pair, amount)
    return model


def denoise(model: Model, process: Process, init: InitImage | None, x: Tensor, t: int) -> Tensor:
    """Return the model's x0, with the initial image's latents where its mask is 0.

    This is all that inpainting needs: every row takes the kept part exactly to the next noise level.
    """
    x0 = process.x0(model(x, t), x, torch.tensor(t))
    return x0 if init is None or init.mask is None else torch.lerp(init.latents, x0, init.mask)


def noisy_start(process: Process, t: int, noise: Tensor, init: InitImage | None) -> Tensor:
    """Return x at timestep t: pure noise, or the noised image; at strength 1, pure noise inside the mask."""
    if init is None:
        return noise
    alpha, sigma = (float(table[t]) for table in (process.schedule.alpha, process.schedule.sigma))
    noised = alpha * init.latents + sigma * noise
    return torch.lerp(noised, noise, init.mask) if init.mask is not None and init.strength == 1 else noised


def last(steps: Iterator[Step]) -> Step:
    """Run all steps and return the last one."""
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
    scheduler = settings.sampler
    check_scheduler(scheduler, process)
    if init is not None and init.mask is not None:
        raise LatentDiffError(
            "inpainting needs a sampler by name, not a scheduler object: the mask is applied at every step"
        )
    if settings.eta is not None:
        raise LatentDiffError(f"eta={settings.eta!r} with a scheduler object: only the sampler 'ddim' takes an eta")
    timesteps(process.schedule.num_timesteps, settings.num_steps)  # raises if num_steps is out of range
    scheduler.set_timesteps(settings.num_steps, device=x.device)
    times = scheduler.timesteps
    if init is None:
        x = x * scheduler.init_noise_sigma
    else:
        skip = settings.num_steps - max(1, int(settings.num_steps * init.strength))
        skip *= getattr(scheduler, "order", 1)  # Heun-type schedulers evaluate the model twice per step
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skip)
        times = times[skip:]
        x = scheduler.add_noise(init.latents.expand_as(x), x, times[:1].expand(len(x)))
    grid = list(dict.fromkeys(times.tolist()))
    if network.start_history() is not None and (len(grid) < len(times) or getattr(scheduler, "order", 1) > 1):
        raise LatentDiffError(
            f"{type(scheduler).__name__} evaluates the model more than once in a step: a model with "
            "unet.trajectory_attention looks back at one evaluation of every step"
        )
    model: Any = guided_model(network, process, features, settings, grid, along_trajectory=True)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": getattr(noise, "generators", None)} if takes_generator else {}
    for t in times:
        output = model(scheduler.scale_model_input(x, t), t.item())
        result = scheduler.step(output, t, x, **extra)
        x = result.prev_sample
        yield Step(int(t), x, getattr(result, "pred_original_sample", x))
