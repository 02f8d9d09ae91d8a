"""What `LatentPipeline` asks of the likelihood: pictures of any kind in, proposals measured where none are kept."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from ..diffusion.process import Variance
from ..errors import LatentDiffError
from ..sampling.images import Picture, load_images
from ..sampling.parts import ModelParts
from .evidence import Evidence, evidence
from .likelihood import Bound, log_likelihood, measure_proposals
from .proposal import Proposals

PILOTS = 16  # pictures that proposals are measured on


class LikelihoodOptions(TypedDict, total=False):
    """Options that `log_likelihood` and `evidence` share; see there."""

    draws: int
    num_timesteps: int | None
    variance: Variance
    posterior_floor: float
    seed: int


class BoundOptions(LikelihoodOptions, total=False):
    """Options of `log_likelihood`."""

    decoder: bool


def bounds(
    pipe: ModelParts, images: Sequence[Picture], prompts: str | Sequence[str], options: BoundOptions
) -> list[Bound]:
    """Bound the log-probability of images, given one prompt for all or one for each."""
    levels, texts = levels_of(pipe, images), [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
    if len(texts) != len(images):
        raise LatentDiffError(f"{len(texts)} prompts for {len(images)} images: expected one for all, or one for each")
    return log_likelihood(pipe, levels, texts, proposals(pipe, levels, texts, options).bound, **options)


def compare_captions(pipe: ModelParts, image: Picture, captions: Sequence[str], options: LikelihoodOptions) -> Evidence:
    """Compare captions of an image."""
    if isinstance(captions, str) or not captions:
        raise LatentDiffError(f"captions={captions!r}: expected a list of them")
    levels = levels_of(pipe, [image])
    kept = proposals(pipe, levels.expand(len(captions), -1, -1, -1), list(captions), options)
    (found,) = evidence(pipe, levels, [captions], kept.captions or kept.bound, **options)
    return found


def levels_of(pipe: ModelParts, images: Sequence[Picture]) -> Tensor:
    """Return images as uint8 (N, 3, H, W), cropped and resized to the model's size."""
    pixels = load_images(images, (pipe.image_size, pipe.image_size))
    return ((pixels + 1) * 127.5).round().to(torch.uint8)


def proposals(pipe: ModelParts, levels: Tensor, prompts: Sequence[str], options: LikelihoodOptions) -> Proposals:
    """Return the model's proposals: kept beside it, or else measured on these pictures."""
    if pipe.proposals is None and pipe.folder is not None:
        pipe.proposals = Proposals.read(pipe.folder, pipe.process.schedule.num_timesteps)
    found: Proposals | None = pipe.proposals
    if found is None or (found.captions is None and any(prompts)):
        variance = options.get("variance", "beta")
        found = measure_proposals(pipe, levels[:PILOTS], prompts[:PILOTS], variance=variance)
        pipe.proposals = found
    return found
