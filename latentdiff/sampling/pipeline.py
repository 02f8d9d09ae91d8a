"""`LatentPipeline`: text-to-image generation with models trained here or saved in diffusers' layout."""

import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, Unpack, cast

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from unet import Experts
from unet.attention import load_attention_backend

from ..device import as_device, check_attention, computes_in_bf16
from ..diffusion.samplers import Step
from ..errors import LatentDiffError
from ..evaluation import asking
from ..evaluation.asking import BoundOptions, LikelihoodOptions
from ..evaluation.evidence import Evidence
from ..evaluation.likelihood import Bound
from ..files.export import save_model
from ..files.open import find_model, open_model
from ..files.scheduler import scheduler_config
from . import editing
from .editing import Inversion
from .graphs import ExpertNetwork
from .images import Picture, paste
from .loop import Features, InitImage, Network, last
from .parts import ModelParts
from .prompts import as_list
from .settings import SamplingOptions, SamplingSettings

Prompt = str | Sequence[str]
METADATA = "latentdiff"  # key of the sampling settings in an image's metadata


class LatentPipeline(ModelParts):
    """A text-to-image model: VAE, UNet, text encoder and noise schedule, in evaluation mode on one device.

    Prompts and options mean the same in all methods, see `__call__`. Input images are Pillow images or file names; they
    are center-cropped and resized to the output size. Methods raise LatentDiffError on an unknown setting, a value out
    of range, or a file that cannot be read or written.
    """

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        tokenizer: str | Path | None = None,
        attention: str = "sdpa",
    ) -> Self:
        """Load a model; raise LatentDiffError if it is missing, damaged or not supported.

        Args:
            name: a model that ships with the package (None: the default one), a folder in diffusers' layout, the output
                of a training run, a `.safetensors` file in the original layout, or a name on the Hugging Face Hub. Of a
                run that has not finished, its newest checkpoint is opened, with an UnfinishedModelWarning.
            device: default: CUDA, else Apple's GPU, else the CPU.
            dtype: default: bfloat16 where the device has fast support for it, else float32.
            variant: of the weight files, such as `fp16`.
            tokenizer: folder of a tokenizer, for a `.safetensors` file without one.
            attention: backend of the UNet's attention layers, `sdpa` or `xformers` (NVIDIA GPUs; the extra `xformers`).
        """
        device = as_device(device)
        check_attention(attention, device)
        load_attention_backend(attention)  # fails before the weights are read
        dtype = (torch.bfloat16 if computes_in_bf16(device) else torch.float32) if dtype is None else dtype
        parts = open_model(name, device=device, dtype=dtype, variant=variant, tokenizer=tokenizer)
        parts.unet.set_attention_backend(attention)
        pipe = cls(vae=parts.vae, unet=parts.unet, text_encoder=parts.text_encoder, **parts.process._asdict())
        path = find_model(name, variant)
        pipe.folder = path if path.is_dir() else None
        return pipe

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the model to a folder for `from_pretrained` and for stock diffusers, which refuses what it cannot draw.

        That is a model that predicts the mean, has experts, or has a UNet that attends to earlier steps.
        """
        save_model(Path(folder), vae=self.vae, unet=self.unet, text_encoder=self.text_encoder, process=self.process)

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Config for a diffusers scheduler: `UniPCMultistepScheduler.from_config(pipe.scheduler_config)`."""
        return scheduler_config(self.process)

    def to(self, *args: torch.device | str | torch.dtype, device: Any = None, dtype: Any = None) -> Self:
        """Move or cast all parts in place: `to("cuda")`, `to(torch.float16)`, `to("cuda", torch.float16)`.

        Raises LatentDiffError if the device is not available, or the dtype is not a floating-point one.
        """
        for arg in args:
            device, dtype = (device, arg) if isinstance(arg, torch.dtype) else (arg, dtype)
        device = None if device is None else as_device(device)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise LatentDiffError(f"dtype={dtype!r}: expected torch.float32, torch.bfloat16 or torch.float16")
        for part in (self.vae, self.unet, self.text_encoder):
            part.to(device=device, dtype=dtype)
        if dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.float()  # its config says that it overflows in float16
        return self

    def compile(self, **options: Any) -> Self:
        """Compile the UNet with torch.compile; the first image of each size takes longer."""
        members = self.unet.members if isinstance(self.unet, Experts) else [self.unet]
        compiled = [cast(Network, torch.compile(each, **{"fullgraph": True, **options})) for each in members]
        self.network = ExpertNetwork(self.unet, compiled) if isinstance(self.unet, Experts) else compiled[0]
        return self

    def __call__(self, prompt: Prompt, **options: Unpack[SamplingOptions]) -> list[Image.Image]:
        """Generate images from prompts.

        Args:
            prompt: one prompt or several; "a (red:1.4) apple" weights words.
            options: fields of `SamplingSettings`: `num_steps`, `guidance_scale`, `sampler`, `seed`, `negative_prompt`,
                `num_images`, `height`, `width` and others.

        Returns:
            The images, grouped by prompt. `image.info["latentdiff"]` holds the settings as JSON.
        """
        return list(self.draw(prompt, **options))

    def draw(self, prompt: Prompt, **options: Unpack[SamplingOptions]) -> Iterator[Image.Image]:
        """Generate the same images one after the other, `batch_size` at a time: each can be used when it is there."""
        return self._sample(as_list(prompt), SamplingSettings.of(options))

    def stream(self, prompt: Prompt, **options: Unpack[SamplingOptions]) -> Iterator[Step]:
        """Generate all images as one batch, yielding after every step; `pipe.decode(step.x0)` gives previews."""
        prompts, settings = as_list(prompt), SamplingSettings.of(options)
        seeds = settings.seeds(len(prompts) * settings.num_images)
        return self.steps(self.features(prompts, settings), seeds, settings)

    def sample_features(self, features: Features, **options: Unpack[SamplingOptions]) -> Tensor:
        """Sample latents (B, c, h, w) from text features (B, L, D), differentiably with `enable_grad=True`."""
        settings = SamplingSettings.of(options)
        return last(self.steps(features, settings.seeds(len(features.cond)), settings)).x

    def img2img(
        self, prompt: Prompt, image: Picture, strength: float = 0.6, **options: Unpack[SamplingOptions]
    ) -> list[Image.Image]:
        """Add noise to an image and denoise it to a prompt.

        Args:
            prompt: one prompt or several.
            image: the image to start from.
            strength: above 0 and at most 1: how much noise to add, and what fraction of the steps to run.
        """
        settings = SamplingSettings.of(options)
        return list(self._sample(as_list(prompt), settings, editing.init_image(self, image, strength, settings)))

    def inpaint(
        self, prompt: Prompt, image: Picture, mask: Picture, strength: float = 1.0, **options: Unpack[SamplingOptions]
    ) -> list[Image.Image]:
        """Regenerate the white part of a mask and leave the rest of the image unchanged.

        Args:
            prompt: one prompt or several.
            image: the image to edit.
            mask: an image of the same size: white is regenerated, black and transparent parts are kept, gray is
                blended. Or an array (height, width) of 0 to 255, 0 and 1, or booleans.
            strength: above 0 and at most 1, which regenerates the masked part from pure noise.
        """
        settings = SamplingSettings.of(options)
        init, pixels, pixel_mask = editing.masked_image(self, image, mask, strength, settings)
        return [paste(sampled, pixels, pixel_mask) for sampled in self._sample(as_list(prompt), settings, init)]

    def invert(
        self, image: Picture, prompt: str = "", *, num_steps: int = 100, guidance_scale: float = 1.0
    ) -> Inversion:
        """Find the noise from which `ddim` samples an image, and sample from it to measure the error.

        Args:
            image: the image to invert, resized to the model's default size.
            prompt: caption of the image, if any.
            num_steps: more steps lose less.
            guidance_scale: 1 disables guidance; larger values make inversion less accurate.
        """
        return editing.invert(self, image, prompt, num_steps, guidance_scale)

    def interpolate(self, a: Any, b: Any, n: int = 8, **options: Unpack[SamplingOptions]) -> list[Image.Image]:
        """Interpolate between two endpoints, in noise and in text features at once.

        Args:
            a: a prompt, an image, or a pair (image, prompt). Images are inverted first, and the sampler is `ddim`.
            b: the other endpoint.
            n: number of images, at least 2, including both endpoints.
            options: with one `seed` both prompts start from the same noise, with two each from its own.
        """
        return editing.interpolate(self, a, b, n, options)

    def exaggerate(
        self,
        prompt: str,
        feature: str | tuple[str, str],
        amount: float = 1.0,
        *,
        image: Picture | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Image.Image]:
        """Generate images of a prompt with more, or less, of a feature.

        Args:
            prompt: what to generate, such as "a noto emoji of a face".
            feature: the prompt with the feature, such as "a noto emoji of a smiling face", or a pair (without, with).
            amount: multiple of the two predictions' difference to add; 0 changes nothing, negative values subtract it.
            image: start from this image's noise, found by inverting it with the prompt, instead of the seed's.
            options: with an image the sampler is `ddim`, and guidance is off by default.
        """
        return editing.exaggerate(self, prompt, feature, amount, image, options)

    def log_likelihood(
        self, images: Picture | Sequence[Picture], prompts: Prompt = "", **options: Unpack[BoundOptions]
    ) -> list[Bound]:
        """Bound from below how probable images are under the model, in nats; see `latentdiff.evaluation.likelihood`.

        Args:
            images: one or more images.
            prompts: one for all images or one for each, taken literally; empty: whatever the model draws unasked.
            options: `draws`, `num_timesteps` (None: all), `variance`, `posterior_floor`, `decoder` (False: leave out
                log p(image | latents), so that the bound is on the latents), `seed`.
        """
        several = images if isinstance(images, list | tuple) else [cast(Picture, images)]
        return asking.bounds(self, several, prompts, options)

    def match_captions(self, image: Picture, captions: Sequence[str], **options: Unpack[LikelihoodOptions]) -> Evidence:
        """Measure how much more probable each caption makes an image, in nats: the largest fits best."""
        return asking.compare_captions(self, image, captions, options)

    def _sample(
        self, prompts: list[str], settings: SamplingSettings, init: InitImage | None = None
    ) -> Iterator[Image.Image]:
        seeds = settings.seeds(len(prompts) * settings.num_images)
        return self._with_metadata(self.sample_images(self.features(prompts, settings), seeds, settings, init),
                                   prompts, seeds, settings, init)  # fmt: skip

    def _with_metadata(
        self, images: Iterator[Image.Image], prompts: list[str], seeds: list[int], settings: SamplingSettings,
        init: InitImage | None,
    ) -> Iterator[Image.Image]:  # fmt: skip
        for index, image in enumerate(images):
            metadata = settings.metadata(prompts, index, seeds[index])
            remember(image, json.dumps(metadata if init is None else {**metadata, "strength": init.strength}))
            yield image


def remember(image: Image.Image, settings: str) -> None:
    """Keep the settings in `image.info` and in every PNG that `image.save` writes."""
    info = PngInfo()
    info.add_text(METADATA, settings)
    image.info[METADATA] = settings
    image.encoderinfo = {"pnginfo": info}  # Pillow's defaults for `save`


def _signature() -> inspect.Signature:
    """Return the signature of a call with all settings spelled out, for `help` and notebooks."""
    names, kinds = SamplingSettings.model_fields, inspect.Parameter
    first = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in ("self", "prompt")]
    rest = [kinds(name, kinds.KEYWORD_ONLY, default=field.default) for name, field in names.items()]
    return inspect.Signature([*first, *rest])


LatentPipeline.__call__.__signature__ = _signature()  # type: ignore[attr-defined]
