"""`LatentPipeline`: prompts in, pictures out, with a model that was trained here or by anyone in diffusers' layout."""

import inspect
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, Unpack, cast

import torch
from PIL import Image
from torch import Tensor

from ..device import as_device, check_attention, computes_in_bf16
from ..diffusion.samplers import Step
from ..files.export import save_model
from ..files.open import open_model
from ..files.scheduler import scheduler_config
from . import editing
from .editing import Inversion
from .images import Picture, paste
from .loop import Features, InitImage, Network, last
from .parts import ModelParts
from .prompts import as_list
from .settings import SamplingOptions, SamplingSettings

Prompt = str | Sequence[str]
METADATA = "latentdiff"  # key of the settings in a picture's metadata


class LatentPipeline(ModelParts):
    """VAE, UNet, text encoder and noise schedule, in evaluation mode on one device."""

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
        """Open a model.

        Args:
            name: a model that comes with the package (None: the default one), a folder in diffusers' layout or a
                training's output, a `.safetensors` file in the original layout, or a name on the Hugging Face hub.
            device: None: CUDA, Apple's GPU or the CPU, whichever there is.
            dtype: None: bfloat16 where the device computes in it, else float32.
            variant: of the weight files, such as `fp16`.
            tokenizer: folder, for a single file that brings none.
            attention: backend of the UNet's attention layers, `sdpa` or `xformers` (NVIDIA GPUs; the extra `xformers`).

        Raises:
            LatentDiffError: it is not there, damaged, or not supported.
        """
        place = as_device(device)
        check_attention(attention, place)
        dtype = (torch.bfloat16 if computes_in_bf16(place) else torch.float32) if dtype is None else dtype
        parts = open_model(name, device=place, dtype=dtype, variant=variant, tokenizer=tokenizer)
        parts.unet.set_attention_backend(attention)
        return cls(vae=parts.vae, unet=parts.unet, text_encoder=parts.text_encoder, **parts.process._asdict())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder that `from_pretrained` and diffusers' StableDiffusionPipeline open.

        Raises:
            LatentDiffError: it cannot be written, or diffusers has no name for the prediction.
        """
        save_model(Path(folder), vae=self.vae, unet=self.unet, text_encoder=self.text_encoder, process=self.process)

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """For diffusers schedulers: `UniPCMultistepScheduler.from_config(pipe.scheduler_config)`."""
        return scheduler_config(self.process)

    def to(self, *place: torch.device | str | torch.dtype, device: Any = None, dtype: Any = None) -> Self:
        """Move or cast all parts, in place: `to("cuda")`, `to(torch.float16)`, `to("cuda", torch.float16)`."""
        for one in place:
            device, dtype = (device, one) if isinstance(one, torch.dtype) else (one, dtype)
        for part in (self.vae, self.unet, self.text_encoder):
            part.to(device=device, dtype=dtype)
        if dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.float()  # it says that it overflows in float16
        return self

    def compile(self, **options: Any) -> Self:
        """Compile the UNet's pass with torch.compile; the first picture of each size takes longer."""
        self.network = cast(Network, torch.compile(self.unet, **{"fullgraph": True, **options}))
        return self

    def __call__(self, prompt: Prompt, **options: Unpack[SamplingOptions]) -> list[Image.Image]:
        """Sample pictures of prompts.

        Args:
            prompt: one or several; "a (red:1.4) apple" weights words.
            options: the fields of `SamplingSettings`, which says what they mean: `num_steps`, `guidance_scale`,
                `sampler`, `seed`, `negative_prompt`, `num_images`, `height`, `width` and the rarer ones.

        Returns:
            The pictures, those of one prompt together. `image.info["latentdiff"]` are the settings as JSON.

        Raises:
            LatentDiffError: a setting is unknown or out of range.
        """
        return self._sample(as_list(prompt), SamplingSettings.of(options))

    def stream(self, prompt: Prompt, **options: Unpack[SamplingOptions]) -> Iterator[Step]:
        """Sample prompts, all at once, and yield after every step; `pipe.decode(step.x0)` shows what is expected."""
        prompts, settings = as_list(prompt), SamplingSettings.of(options)
        seeds = settings.seeds(len(prompts) * settings.num_images)
        return self.steps(self.features(prompts, settings), seeds, settings)

    def sample_features(self, features: Features, **options: Unpack[SamplingOptions]) -> Tensor:
        """Text features (B, L, D) to latents (B, c, h, w); with `enable_grad=True` their graph is kept.

        Raises:
            LatentDiffError: as a call.
        """
        settings = SamplingSettings.of(options)
        return last(self.steps(features, settings.seeds(len(features.wanted)), settings)).x

    def img2img(
        self, prompt: Prompt, image: Picture, strength: float = 0.6, **options: Unpack[SamplingOptions]
    ) -> list[Image.Image]:
        """Start from a picture: noise it, then denoise it to a prompt.

        Args:
            prompt: as in a call.
            image: Pillow picture or file; cut and resized to what is sampled.
            strength: above 0, to 1: how much noise, and what share of the steps is run.
            options: as in a call.

        Raises:
            LatentDiffError: a setting is out of range, or the picture cannot be read.
        """
        settings = SamplingSettings.of(options)
        return self._sample(as_list(prompt), settings, editing.init_image(self, image, strength, settings))

    def inpaint(
        self, prompt: Prompt, image: Picture, mask: Picture, strength: float = 1.0, **options: Unpack[SamplingOptions]
    ) -> list[Image.Image]:
        """Sample the white part of the mask anew; the rest stays as it is.

        Args:
            prompt: as in a call.
            image: Pillow picture or file; cut and resized to what is sampled.
            mask: of the picture's size; white is sampled, black stays, grey is mixed.
            strength: above 0, to 1: 1 forgets what was under the mask.
            options: as in a call.

        Raises:
            LatentDiffError: a setting is out of range, or the mask's size is not the picture's.
        """
        settings = SamplingSettings.of(options)
        init, pixels, whole = editing.masked_image(self, image, mask, strength, settings)
        return [paste(one, pixels, whole) for one in self._sample(as_list(prompt), settings, init)]

    def invert(
        self, image: Picture, prompt: str = "", *, num_steps: int = 100, guidance_scale: float = 1.0
    ) -> Inversion:
        """Find the noise from which `ddim` samples a picture, and sample it again to see how well.

        Args:
            image: Pillow picture or file; cut and resized to the model's size.
            prompt: the picture's caption, or nothing.
            num_steps: more lose less.
            guidance_scale: 1 is off; guidance makes the way back less sure.

        Raises:
            LatentDiffError: the picture cannot be read, or a number is out of range.
        """
        return editing.invert(self, image, prompt, num_steps, guidance_scale)

    def interpolate(self, a: Any, b: Any, n: int = 8, **options: Unpack[SamplingOptions]) -> list[Image.Image]:
        """Walk from one end to the other, in noise and in text features at once.

        Args:
            a: a prompt, a picture, or a pair (picture, prompt). A picture is inverted first, by `ddim`.
            b: the other end.
            n: pictures, both ends included; from 2 up.
            options: as in a call. With one `seed` both prompts start from the same noise, with two each from its own.

        Raises:
            LatentDiffError: a setting is out of range.
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
        """Sample a prompt with more, or less, of a feature.

        Args:
            prompt: what to sample, "a noto emoji of a face".
            feature: the same with the feature, "a noto emoji of a smiling face"; or a pair (without, with).
            amount: 0 changes nothing, 1 adds the difference once, negative numbers take away.
            image: start from this picture's noise, found by `invert` with the prompt, instead of the seed's.
            options: as in a call; with an image the sampler is `ddim`, and guidance is off unless given.

        Raises:
            LatentDiffError: a setting is out of range.
        """
        return editing.exaggerate(self, prompt, feature, amount, image, options)

    def _sample(
        self, prompts: list[str], settings: SamplingSettings, init: InitImage | None = None
    ) -> list[Image.Image]:
        seeds = settings.seeds(len(prompts) * settings.num_images)
        images = self.sample_images(self.features(prompts, settings), seeds, settings, init)
        for place, image in enumerate(images):
            facts = settings.metadata(prompts, place, seeds[place])
            image.info[METADATA] = json.dumps(facts if init is None else {**facts, "strength": init.strength})
        return images


def _signature() -> inspect.Signature:
    """That of a call with the settings spelt out, for `help` and notebooks."""
    names, kinds = SamplingSettings.model_fields, inspect.Parameter
    first = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in ("self", "prompt")]
    rest = [kinds(name, kinds.KEYWORD_ONLY, default=field.default) for name, field in names.items()]
    return inspect.Signature([*first, *rest])


LatentPipeline.__call__.__signature__ = _signature()  # type: ignore[attr-defined]
