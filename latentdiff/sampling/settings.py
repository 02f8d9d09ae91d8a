"""How to sample, apart from what: one model of settings for the API, the command line and the evaluation.

Nothing heavy is imported here: the command line shows these settings in its help.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..errors import LatentDiffError, check_choice

if TYPE_CHECKING:
    from torch import Tensor

MAX_SEED = 2**63 - 1
MAX_SIDE = 16384  # pixels

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=False)]
NOT_IN_METADATA = {"seed", "num_images", "latents", "batch_size", "progress", "enable_grad", "negative_prompt"}


def _interval(value: object) -> object:
    if (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(is_int(one) or isinstance(one, float) for one in value)
    ):
        return tuple(map(float, value))
    if value is not None:
        raise ValueError("two numbers (low, high), of sigma/alpha")
    return None


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingSettings` as keywords, for type checkers."""

    negative_prompt: str | Sequence[str]
    num_steps: int
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    sampler: Any
    eta: float | None
    seed: int | Sequence[int] | None
    num_images: int
    height: int | None
    width: int | None
    latents: Tensor | None
    batch_size: int
    progress: bool
    enable_grad: bool


class SamplingSettings(BaseModel):
    """Settings of one call, checked; what depends on the model is checked where it is used.

    Raises:
        LatentDiffError: a setting is unknown or out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True)

    negative_prompt: Any = ""
    """What to steer away from: one for all prompts, or one each."""
    num_steps: int = 25
    """Network evaluations, 1 to the number of timesteps (twice as many passes with guidance)."""
    guidance_scale: Number = 5.0
    """How strongly to follow the prompt; 1 is off, and twice as fast."""
    guidance_rescale: Number = 0.0
    """0 to 1: against oversaturation (arXiv 2305.08891)."""
    guidance_interval: Annotated[tuple[float, float] | None, BeforeValidator(_interval)] = None
    """Noise levels sigma/alpha, low and high, between which guidance is on (arXiv 2404.07724)."""
    sampler: Any = "dpmpp_2m"
    """`ddpm`, `ddim`, `euler`, `dpmpp_2m`, `dpmpp_2m_sde`, or a diffusers scheduler object."""
    eta: Number | None = None
    """Of `ddim`: 0 is deterministic, 1 is `ddpm`."""
    seed: Any = None
    """Of the first picture, the next have seed + 1, ...; or one each; or None for random ones. A picture depends on its
    own seed, not on its neighbours."""
    num_images: Count = 1
    """Pictures a prompt."""
    height: Any = None
    """Pixels, a multiple of the VAE's factor; by default as in training."""
    width: Any = None
    """Pixels."""
    latents: Any = None
    """Standard normal noise to start from, (pictures, c, h, w), instead of the seed's."""
    batch_size: Count = 16
    """Pictures at a time."""
    progress: Flag = True
    """A bar, where there is a terminal."""
    enable_grad: Flag = False
    """Keep the graph, from the text features to the latents."""

    def __init__(self, **values: Any) -> None:
        for name in values:
            check_choice("setting", name, type(self).model_fields)
        values = {key: value.tolist() if type(value).__module__ == "numpy" and key != "latents" else value
                  for key, value in values.items()}  # fmt: skip
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name, expected = str(first["loc"][0]), re.sub("^(Input should be|Value error,) ", "", first["msg"])
            expected = expected.replace("valid integer", "whole number").replace("valid ", "")
            raise LatentDiffError(f"{name}={values[name]!r:.200}: expected {expected}") from None

    @classmethod
    def of(cls, options: SamplingOptions) -> SamplingSettings:
        """The settings with these values, the defaults elsewhere."""
        return cls(**options)

    def seeds(self, count: int) -> list[int]:
        """One seed a picture.

        Raises:
            LatentDiffError: not one each, or out of range.
        """
        if (shape := getattr(self.latents, "shape", ())) and shape[0] != count:
            raise LatentDiffError(f"latents are {shape[0]} for {count} pictures: give one for each")
        first = self.seed
        if first is None:
            import torch

            first = int(torch.randint(2**31, (), dtype=torch.int64))
        if not is_int(first) and not isinstance(first, list | tuple | range):
            raise LatentDiffError(f"seed={first!r}: expected a whole number, or one for each picture")
        seeds = [first + place for place in range(count)] if is_int(first) else list(first)
        if len(seeds) != count:
            raise LatentDiffError(f"seed has {len(seeds)} numbers for {count} pictures: give one, or one for each")
        for seed in seeds:
            if not is_int(seed) or not 0 <= seed <= MAX_SEED:
                raise LatentDiffError(f"seed={seed!r}: expected a whole number from 0 to {MAX_SEED}")
        return seeds

    def negatives(self, count: int) -> list[str]:
        """One negative prompt for each of `count` prompts.

        Raises:
            LatentDiffError: there are neither one nor as many as prompts.
        """
        given = self.negative_prompt
        if isinstance(given, str):
            return [given] * count
        if isinstance(given, list | tuple) and len(given) == count and all(isinstance(text, str) for text in given):
            return list(given)
        raise LatentDiffError(f"negative_prompt={given!r}: expected one string, or one for each of {count} prompts")

    def latent_size(self, factor: int, default: int) -> tuple[int, int]:
        """Height and width of the latents.

        Args:
            factor: pixels a latent along one side.
            default: latents along one side in training.

        Raises:
            LatentDiffError: a size that the factor does not divide, or out of range.
        """
        for name, value in (("height", self.height), ("width", self.width)):
            if value is not None and (not is_int(value) or value % factor or not 0 < value <= MAX_SIDE):
                raise LatentDiffError(f"{name}={value!r}: expected a multiple of {factor} from {factor} to {MAX_SIDE}")
        return (self.height or default * factor) // factor, (self.width or default * factor) // factor

    def initial_noise(self, place: slice, shape: tuple[int, ...]) -> Tensor | None:
        """The part of `latents` that belongs to the pictures at `place`, where any were given.

        Raises:
            LatentDiffError: they have another shape.
        """
        if self.latents is None:
            return None
        from torch import Tensor

        found = tuple(self.latents.shape) if isinstance(self.latents, Tensor) else type(self.latents).__name__
        if found[1:] != shape or not len(part := self.latents[place]):
            raise LatentDiffError(f"latents are {found}; expected (pictures, {', '.join(map(str, shape))})")
        return part

    def metadata(self, prompts: Sequence[str], place: int, seed: int) -> dict[str, Any]:
        """What the picture at `place` says of itself: all but what belongs to the machine or to other pictures."""
        number = place // self.num_images
        values: dict[str, Any] = {"prompt": prompts[number], "negative_prompt": self.negatives(len(prompts))[number]}
        if self.latents is None:  # else it did not start from the seed's noise
            values["seed"] = seed
        values |= {name: getattr(self, name) for name in type(self).model_fields if name not in NOT_IN_METADATA}
        if not isinstance(self.sampler, str):
            values["sampler"] = type(self.sampler).__name__
        return {name: value for name, value in values.items() if value is not None}


def is_int(value: object) -> bool:
    """Whether it is a whole number, true and false not counted."""
    return isinstance(value, int) and not isinstance(value, bool)
