"""Sampling settings, shared by the API, the command line and the evaluation.

Nothing heavy is imported here, because the command line's help lists these settings.
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
MAX_CHARACTERS = 10_000  # of a prompt; a tokenizer would spend minutes and gigabytes on millions
MAX_SIDE = 16384  # pixels

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=False)]
NOT_IN_METADATA = {"seed", "num_images", "latents", "batch_size", "progress", "enable_grad", "negative_prompt"}


def _interval(value: object) -> object:
    if (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(is_int(bound) or isinstance(bound, float) for bound in value)
    ):
        return tuple(map(float, value))
    if value is not None:
        raise ValueError("two numbers (low, high) in units of sigma/alpha")
    return None


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingSettings` as keyword arguments, for type checkers."""

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
    """Settings of a sampling call; raises LatentDiffError on an unknown setting or one out of range."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, defer_build=True)

    negative_prompt: Any = ""
    """What to steer away from: one prompt for all, or one for each prompt."""
    num_steps: int = 25
    """Number of denoising steps, up to the number of timesteps; guidance doubles the cost of each."""
    guidance_scale: Number = 5.0
    """How strongly to follow the prompt; 1 disables guidance and is twice as fast."""
    guidance_rescale: Number = 0.0
    """0 to 1: how strongly to counteract oversaturation (arXiv 2305.08891)."""
    guidance_interval: Annotated[tuple[float, float] | None, BeforeValidator(_interval)] = None
    """Range (low, high) of noise levels sigma/alpha in which guidance is on (arXiv 2404.07724); default: everywhere."""
    sampler: Any = "dpmpp_2m"
    """`ddpm`, `ddim`, `euler`, `dpmpp_2m`, `dpmpp_2m_sde`, or a diffusers scheduler object."""
    eta: Number | None = None
    """For `ddim` only: 0 (the default) is deterministic, 1 is `ddpm`."""
    seed: Any = None
    """Seed of the first image (the others get seed + 1, ...), or one seed per image; default: random. An image depends
    on its own seed only, not on the rest of the batch."""
    num_images: Count = 1
    """Images per prompt."""
    height: Any = None
    """Height in pixels, a multiple of the VAE's downsampling factor; default: as in training."""
    width: Any = None
    """Width in pixels, likewise."""
    latents: Any = None
    """Standard normal noise to start from, (images, c, h, w), instead of the seed's."""
    batch_size: Count = 16
    """Number of images sampled at a time."""
    progress: Flag = True
    """Show a progress bar if there is a terminal."""
    enable_grad: Flag = False
    """Keep the autograd graph from text features to latents."""

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
            expected = expected.replace("a valid integer", "an integer").replace("valid ", "")
            raise LatentDiffError(f"{name}={values[name]!r:.200}: expected {expected}") from None

    @classmethod
    def of(cls, options: SamplingOptions) -> SamplingSettings:
        """Create settings from keyword arguments, with defaults for the rest."""
        return cls(**options)

    def seeds(self, count: int) -> list[int]:
        """Return one seed per image."""
        if (shape := getattr(self.latents, "shape", ())) and shape[0] != count:
            raise LatentDiffError(f"latents has {shape[0]} entries for {count} images: expected one for each")
        first = self.seed
        if first is None:
            import torch

            first = int(torch.randint(2**31, (), dtype=torch.int64))
        if not is_int(first) and not isinstance(first, list | tuple | range):
            raise LatentDiffError(f"seed={first!r}: expected an integer, or one for each image")
        seeds = [first + index for index in range(count)] if is_int(first) else list(first)
        if len(seeds) != count:
            raise LatentDiffError(f"seed has {len(seeds)} entries for {count} images: expected one for each")
        for seed in seeds:
            if not is_int(seed) or not 0 <= seed <= MAX_SEED:
                raise LatentDiffError(f"seed={seed!r}: expected an integer from 0 to {MAX_SEED}")
        return seeds

    def negatives(self, count: int) -> list[str]:
        """Return one negative prompt for each of `count` prompts."""
        given = self.negative_prompt
        if isinstance(given, str):
            check_length("negative_prompt", [given])
            return [given] * count
        if isinstance(given, list | tuple) and len(given) == count and all(isinstance(text, str) for text in given):
            check_length("negative_prompt", given)
            return list(given)
        raise LatentDiffError(f"negative_prompt={given!r}: expected one string, or one for each of {count} prompts")

    def latent_size(self, factor: int, default: int) -> tuple[int, int]:
        """Return the height and width of the latents, given the VAE's downsampling factor and the default size."""
        for name, value in (("height", self.height), ("width", self.width)):
            if value is not None and (not is_int(value) or value % factor or not 0 < value <= MAX_SIDE):
                raise LatentDiffError(f"{name}={value!r}: expected a multiple of {factor} from {factor} to {MAX_SIDE}")
        return (self.height or default * factor) // factor, (self.width or default * factor) // factor

    def initial_noise(self, index: slice, shape: tuple[int, ...]) -> Tensor | None:
        """Return the part of `latents` for the images at `index`, or None if no latents were given."""
        if self.latents is None:
            return None
        from torch import Tensor

        found = tuple(self.latents.shape) if isinstance(self.latents, Tensor) else type(self.latents).__name__
        if found[1:] != shape or not len(part := self.latents[index]):
            raise LatentDiffError(f"latents={found}: expected shape (images, {', '.join(map(str, shape))})")
        return part

    def metadata(self, prompts: Sequence[str], index: int, seed: int) -> dict[str, Any]:
        """Return the settings that reproduce the image at `index`, without those of the machine or of other images."""
        row = index // self.num_images
        values: dict[str, Any] = {"prompt": prompts[row], "negative_prompt": self.negatives(len(prompts))[row]}
        if self.latents is None:  # otherwise it did not start from the seed's noise
            values["seed"] = seed
        values |= {name: getattr(self, name) for name in type(self).model_fields if name not in NOT_IN_METADATA}
        if not isinstance(self.sampler, str):
            values["sampler"] = type(self.sampler).__name__
        return {name: value for name, value in values.items() if value is not None}


def check_length(what: str, texts: Sequence[str]) -> None:
    """Raise LatentDiffError if a text is far longer than any prompt."""
    for text in texts:
        if len(text) > MAX_CHARACTERS:
            raise LatentDiffError(f"{what} {text[:40]!r}… has {len(text):,} characters: expected at most "
                                  f"{MAX_CHARACTERS:,}")  # fmt: skip


def is_int(value: object) -> bool:
    """Return whether a value is an integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)
