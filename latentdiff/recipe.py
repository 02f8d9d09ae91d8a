"""How to draw, apart from what: the settings that LatentPipeline's methods share, checked in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypedDict

import torch
from torch import Tensor

from .errors import LatentDiffError, check_choice

MAX_SEED = 2**63 - 1
MAX_SIDE = 16384  # pixels


def is_number(value: object) -> bool:
    """Whether it is one, true and false not counted."""
    return isinstance(value, int | float) and not isinstance(value, bool)


class Settings(TypedDict, total=False):
    """The rarer settings as keywords, for type checkers; `Recipe` says what they mean."""

    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    eta: float | None
    latents: Tensor | None
    batch_size: int
    progress: bool
    enable_grad: bool


class Options(Settings, total=False):
    """All settings as keywords."""

    negative_prompt: str | Sequence[str]
    num_steps: int
    guidance_scale: float
    sampler: Any
    seed: int | Sequence[int] | None
    num_images: int
    height: int | None
    width: int | None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of one drawing.

    Raises:
        LatentDiffError: a value is out of range; num_steps and guidance are checked where they are used.
    """

    negative_prompt: str | Sequence[str] = ""  # what to steer away from: one for all prompts, or one each
    num_steps: int = 25  # network evaluations (twice as many passes with guidance)
    guidance_scale: float = 5.0  # 1 is off
    guidance_rescale: float = 0.0  # 0 to 1, arXiv 2305.08891
    guidance_interval: tuple[float, float] | None = None  # sigma/alpha where guidance is on, arXiv 2404.07724
    sampler: Any = "dpmpp_2m"  # a name, or a diffusers scheduler object
    eta: float | None = None  # of `ddim`: 0 is deterministic
    seed: int | Sequence[int] | None = None  # of the first picture, the next have seed + 1, ...; or one each; or random
    num_images: int = 1  # pictures a prompt
    height: int | None = None  # pixels; None: what the model was trained on
    width: int | None = None
    latents: Tensor | None = None  # standard normal noise to start from, (pictures, c, h, w), instead of the seed's
    batch_size: int = 16  # pictures at a time
    progress: bool = True  # a bar, where there is a terminal
    enable_grad: bool = False  # keep the graph, from the text features to the latents

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1_000_000:
                raise LatentDiffError(f"{name}={value!r}: expected a whole number from 1 up")
        for name in ("guidance_scale", "guidance_rescale", "eta"):
            value = getattr(self, name)
            if not is_number(value) and not (name == "eta" and value is None):
                raise LatentDiffError(f"{name}={value!r}: expected a number")
        interval = self.guidance_interval
        pair = isinstance(interval, list | tuple) and len(interval) == 2 and all(map(is_number, interval))
        if interval is not None and not pair:
            raise LatentDiffError(f"guidance_interval={interval!r}: expected two numbers (low, high), of sigma/alpha")

    @classmethod
    def of(cls, options: Options) -> Recipe:
        """The recipe with these settings.

        Raises:
            LatentDiffError: a setting is unknown or out of range.
        """
        for name in options:
            check_choice("setting", name, [field.name for field in fields(cls)])
        return cls(**options)

    def seeds(self, count: int) -> list[int]:
        """One seed a picture.

        Raises:
            LatentDiffError: not one each, or out of range.
        """
        if isinstance(self.latents, Tensor) and len(self.latents) != count:
            raise LatentDiffError(f"latents are {len(self.latents)} for {count} pictures: give one for each")
        if self.seed is None:
            first = int(torch.randint(2**31, (), dtype=torch.int64))
            return [first + place for place in range(count)]
        if not isinstance(self.seed, int | list | tuple | range) or isinstance(self.seed, bool):
            raise LatentDiffError(f"seed={self.seed!r}: expected a whole number, or one for each picture")
        seeds = [self.seed + place for place in range(count)] if isinstance(self.seed, int) else list(self.seed)
        if len(seeds) != count:
            raise LatentDiffError(f"seed has {len(seeds)} numbers for {count} pictures: give one, or one for each")
        for seed in seeds:
            if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MAX_SEED:
                raise LatentDiffError(f"seed={seed!r}: expected a whole number from 0 to {MAX_SEED}")
        return seeds

    def negatives(self, count: int) -> list[str]:
        """One negative prompt for each of `count` prompts.

        Raises:
            LatentDiffError: there are neither one nor as many as prompts.
        """
        if isinstance(self.negative_prompt, str):
            return [self.negative_prompt] * count
        several = self.negative_prompt if isinstance(self.negative_prompt, list | tuple) else ()
        if len(several) != count or not all(isinstance(prompt, str) for prompt in several):
            raise LatentDiffError(
                f"negative_prompt={self.negative_prompt!r}: expected one string, or one for each of {count} prompts"
            )
        return list(several)

    def latent_size(self, factor: int, default: int) -> tuple[int, int]:
        """Height and width of the latents.

        Args:
            factor: pixels a latent along one side.
            default: latents along one side in training.

        Raises:
            LatentDiffError: a size that the factor does not divide, or out of range.
        """
        sizes = []
        for name, value in (("height", self.height), ("width", self.width)):
            value = default * factor if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value % factor or not 0 < value <= MAX_SIDE:
                raise LatentDiffError(f"{name}={value!r}: expected a multiple of {factor} from {factor} to {MAX_SIDE}")
            sizes.append(value // factor)
        return sizes[0], sizes[1]

    def noise(self, place: slice, shape: tuple[int, ...]) -> Tensor | None:
        """The part of `latents` that belongs to the pictures at `place`, where any were given.

        Raises:
            LatentDiffError: they have another shape.
        """
        if self.latents is None:
            return None
        found = tuple(self.latents.shape) if isinstance(self.latents, Tensor) else type(self.latents).__name__
        if found[1:] != shape or not isinstance(self.latents, Tensor) or len(self.latents[place]) == 0:
            raise LatentDiffError(f"latents are {found}; expected (pictures, {', '.join(map(str, shape))})")
        return self.latents[place]

    def facts(self, prompts: Sequence[str], place: int, seed: int) -> dict[str, Any]:
        """What the metadata of the picture at `place` say: all but what belongs to the machine or to other pictures."""
        skipped = ("seed", "num_images", "latents", "batch_size", "progress", "enable_grad", "negative_prompt")
        number = place // self.num_images
        values: dict[str, Any] = {"prompt": prompts[number], "negative_prompt": self.negatives(len(prompts))[number]}
        if self.latents is None:  # else it did not start from the seed's noise
            values |= {"seed": seed}
        values |= {field.name: getattr(self, field.name) for field in fields(self) if field.name not in skipped}
        if not isinstance(self.sampler, str):
            values["sampler"] = type(self.sampler).__name__
        return {name: value for name, value in values.items() if value is not None}
