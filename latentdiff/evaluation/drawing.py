"""Drawing for the evaluation: each picture is kept in a file at once, and a killed evaluation goes on from there."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image

from ..data.cache import text_encoder_digest, weights_digest
from ..data.shards import digest
from ..sampling.loop import Features
from ..sampling.parts import ModelParts
from ..sampling.settings import SamplingSettings


def model_digest(pipe: ModelParts) -> str:
    """Return a digest of what a model's pictures depend on besides prompt and settings."""
    schedule, *rest = pipe.process
    return digest({
        "vae": [weights_digest(pipe.vae), pipe.vae.config.to_diffusers()],
        "unet": [weights_digest(pipe.unet), repr(pipe.unet.config)],
        "text_encoder": text_encoder_digest(pipe.text_encoder),
        "process": [schedule.betas.tolist(), *rest],
    })[:12]  # fmt: skip


@torch.no_grad()
def draw(
    pipe: ModelParts, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings, folder: Path | None
) -> list[Image.Image]:
    """Draw a picture of each prompt with its own seed, except those that are in the folder already.

    Prompts are taken literally, as in training: parentheses do not weight them. A file is named after all that its
    picture depends on, so another model, setting, prompt or seed never finds it.
    """
    if folder is None:
        return list(_sample(pipe, prompts, seeds, settings))
    folder = folder / model_digest(pipe)
    folder.mkdir(parents=True, exist_ok=True)
    facts = [settings.metadata([prompt], 0, seed) | {"dtype": str(pipe.unet.conv_in.weight.dtype)}
             for prompt, seed in zip(prompts, seeds, strict=True)]  # fmt: skip
    paths = [folder / f"{hashlib.sha256(json.dumps(each).encode()).hexdigest()[:20]}.png" for each in facts]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    images = _sample(pipe, [prompts[number] for number in missing], [seeds[number] for number in missing], settings)
    for number, image in zip(missing, images, strict=True):
        unfinished = paths[number].with_suffix(f".{os.getpid()}")
        image.save(unfinished, "PNG")
        os.replace(unfinished, paths[number])
    return [Image.open(path).convert("RGB") for path in paths]


def _sample(
    pipe: ModelParts, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings
) -> Iterator[Image.Image]:
    if prompts:
        null_context = None if settings.guidance_scale == 1 else pipe.text_encoder.null_context(len(prompts))
        yield from pipe.sample_images(Features(pipe.text_encoder(prompts), null_context), seeds, settings)
