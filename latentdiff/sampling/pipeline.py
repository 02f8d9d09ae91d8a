"""`LatentPipeline`: prompts in, pictures out, with a model that was trained here or by anyone in diffusers' layout."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor

from text_encoder import TextEncoder
from unet import UNet
from vae import VAE

from ..device import as_device, computes_in_bf16
from ..diffusion.process import Prediction, Process, check_prediction
from ..diffusion.samplers import Spacing, Step
from ..diffusion.schedule import Schedule
from ..errors import LatentDiffError
from ..evaluation.grid import to_images
from ..files.model_folder import save_model
from ..files.open import open_model
from ..files.scheduler import scheduler_config
from . import editing
from .editing import Inversion
from .images import load_images, load_mask, paste
from .loop import Features, Forward, Source, check_strength, draw_batch, draw_batches, last
from .prompts import as_list, text_features
from .settings import Options, Recipe, Settings

Prompt = str | Sequence[str]
Picture = Image.Image | str | Path
RECIPE_KEY = "latentdiff"  # in a picture's metadata


class LatentPipeline:
    """VAE, UNet, text encoder and noise schedule, in evaluation mode on one device."""

    def __init__(
        self,
        *,
        vae: VAE,
        unet: UNet,
        text_encoder: TextEncoder,
        schedule: Schedule,
        prediction: Prediction = "v",
        spacing: Spacing = "trailing",
        offset: int = 0,
        ends_clean: bool = True,
    ) -> None:
        """Put a pipeline together.

        Args:
            vae: between pixels and latents.
            unet: predicts from noisy latents.
            text_encoder: prompts to features, as wide as the UNet's context.
            schedule: the forward process the UNet was trained on.
            prediction: what the UNet predicts.
            spacing: of the timesteps that are sampled.
            offset: of leading spacing.
            ends_clean: False ends at the noise level of t = 0, as the original Stable Diffusion does.

        Raises:
            LatentDiffError: the parts do not fit together.
        """
        check_prediction(prediction, schedule)
        for what, found, expected in (
            ("the text encoder's width", text_encoder.context_dim, unet.config.context_dim),
            ("the VAE's latent channels", vae.config.latent_channels, unet.config.in_channels),
            ("the UNet's out_channels", unet.config.out_channels, unet.config.in_channels),
        ):
            if found != expected:
                raise LatentDiffError(f"{what} {found} and the UNet's {expected} differ: not parts of one model")
        self.vae, self.unet, self.text_encoder = vae.eval(), unet.eval(), text_encoder.eval()
        self.process = Process(schedule, prediction, spacing, offset, ends_clean)
        self.forward: Forward = unet

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        tokenizer: str | Path | None = None,
    ) -> LatentPipeline:
        """Open a model.

        Args:
            name: a model that comes with the package (None: the default one), a folder in diffusers' layout or a
                training's output, a `.safetensors` file in the original layout, or a name on the Hugging Face hub.
            device: None: CUDA, Apple's GPU or the CPU, whichever there is.
            dtype: None: bfloat16 where the device computes in it, else float32.
            variant: of the weight files, such as `fp16`.
            tokenizer: folder, for a single file that brings none.

        Raises:
            LatentDiffError, VAEError, UNetError, TextEncoderError: what is not there, damaged, or not supported.
        """
        place = as_device(device)
        dtype = (torch.bfloat16 if computes_in_bf16(place) else torch.float32) if dtype is None else dtype
        parts = open_model(name, device=place, dtype=dtype, variant=variant, tokenizer=tokenizer)
        return cls(vae=parts.vae, unet=parts.unet, text_encoder=parts.text_encoder, **parts.process._asdict())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder that `from_pretrained` and diffusers' StableDiffusionPipeline open.

        Raises:
            LatentDiffError: it cannot be written, or diffusers has no name for the prediction.
        """
        save_model(Path(folder), vae=self.vae, unet=self.unet, text_encoder=self.text_encoder, process=self.process)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.unet.conv_in.weight.device

    @property
    def image_size(self) -> int:
        """Pixels along one side that the model draws by default."""
        return (self.unet.config.sample_size or 32) * self.vae.config.downsampling

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """For diffusers schedulers: `UniPCMultistepScheduler.from_config(pipe.scheduler_config)`."""
        return scheduler_config(self.process)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LatentPipeline:
        """Move or cast all parts, in place."""
        for part in (self.vae, self.unet, self.text_encoder):
            part.to(device=device, dtype=dtype)
        if dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.float()  # it says that it overflows in float16
        return self

    def compile(self, **options: Any) -> LatentPipeline:
        """Compile the UNet's pass with torch.compile; the first picture of each size takes longer."""
        self.forward = torch.compile(self.unet, **{"fullgraph": True, **options})
        return self

    def __call__(
        self,
        prompt: Prompt,
        *,
        negative_prompt: Prompt = "",
        num_steps: int = 25,
        guidance_scale: float = 5.0,
        sampler: Any = "dpmpp_2m",
        seed: int | Sequence[int] | None = None,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        **settings: Unpack[Settings],
    ) -> list[Image.Image]:
        """Draw prompts.

        Args:
            prompt: one or several; "a (red:1.4) apple" weights words.
            negative_prompt: what to steer away from, one for all prompts or one each.
            num_steps: 1 to the number of timesteps.
            guidance_scale: how strongly to follow the prompt; 1 is off, and twice as fast.
            sampler: `ddpm`, `ddim`, `euler`, `dpmpp_2m`, `dpmpp_2m_sde`, or a diffusers scheduler object.
            seed: of the first picture, the next have seed + 1, ...; or one each; or None for random ones. A picture
                depends on its own seed, not on its neighbours.
            num_images: pictures a prompt.
            height: in pixels, a multiple of the VAE's factor; None: as in training.
            width: likewise.
            settings: the rarer ones of `Recipe`: `guidance_rescale`, `guidance_interval`, `eta`, `latents`, ...

        Returns:
            The pictures, those of one prompt together. `image.info["latentdiff"]` is the recipe as JSON.

        Raises:
            LatentDiffError: a setting is out of range.
        """
        options: Options = {
            "negative_prompt": negative_prompt,
            "num_steps": num_steps,
            "guidance_scale": guidance_scale,
            "sampler": sampler,
            "seed": seed,
            "num_images": num_images,
            "height": height,
            "width": width,
            **settings,
        }
        return self._draw(as_list(prompt), Recipe.of(options))

    def img2img(
        self, prompt: Prompt, image: Picture, strength: float = 0.6, **options: Unpack[Options]
    ) -> list[Image.Image]:
        """Draw over a picture: noise it, then denoise it to a prompt.

        Args:
            prompt: as in a call.
            image: Pillow picture or file; cut and resized to what is drawn.
            strength: above 0, to 1: how much noise, and what share of the steps is run.
            options: as in a call.

        Raises:
            LatentDiffError: a setting is out of range, or the picture cannot be read.
        """
        recipe = Recipe.of(options)
        latents = self.encode(image, size=self.pixel_size(recipe))
        return self._draw(as_list(prompt), recipe, Source(latents, check_strength(strength)))

    def inpaint(
        self, prompt: Prompt, image: Picture, mask: Picture, strength: float = 1.0, **options: Unpack[Options]
    ) -> list[Image.Image]:
        """Draw the white part of the mask anew; the rest stays as it is.

        Args:
            prompt: as in a call.
            image: Pillow picture or file; cut and resized to what is drawn.
            mask: of the picture's size; white is drawn, black stays, grey is mixed.
            strength: above 0, to 1: 1 forgets what was under the mask.
            options: as in a call.

        Raises:
            LatentDiffError: a setting is out of range, or the mask's size is not the picture's.
        """
        recipe = Recipe.of(options)
        size = self.pixel_size(recipe)
        pixels, whole = load_images([image], size), load_mask(mask, image, size)
        latents = self.latents_of(pixels)
        small = torch.nn.functional.adaptive_max_pool2d(whole, latents.shape[-2:]).to(self.device)
        drawn = self._draw(as_list(prompt), recipe, Source(latents, check_strength(strength), small))
        return [paste(one, pixels, whole) for one in drawn]

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[Step]:
        """Draw prompts, all at once, and yield after every step; `pipe.decode(step.x0)` shows what is expected."""
        prompts, recipe = as_list(prompt), Recipe.of(options)
        seeds = recipe.seeds(len(prompts) * recipe.num_images)
        return draw_batch(self, self.features(prompts, recipe), seeds, recipe)

    def features(self, prompts: Sequence[str], recipe: Recipe) -> Features:
        """Text features of every picture to draw."""
        with torch.set_grad_enabled(recipe.enable_grad):
            repeated = [prompt for prompt in prompts for _ in range(recipe.num_images)]
            unwanted = [prompt for prompt in recipe.negatives(len(prompts)) for _ in range(recipe.num_images)]
            wanted = text_features(self.text_encoder, repeated)
            return Features(wanted, None if recipe.guidance_scale == 1 else text_features(self.text_encoder, unwanted))

    def draw_features(self, features: Features, **options: Unpack[Options]) -> Tensor:
        """Text features (B, L, D) to latents (B, c, h, w); with `enable_grad=True` their graph is kept.

        Raises:
            LatentDiffError: as a call.
        """
        recipe = Recipe.of(options)
        return last(draw_batch(self, features, recipe.seeds(len(features.wanted)), recipe)).x

    @torch.no_grad()
    def encode(self, image: Picture | Sequence[Picture], *, size: tuple[int, int] | None = None) -> Tensor:
        """Pictures to latents (B, c, h, w), float32: the posterior's mode of the middle square, resized.

        Raises:
            LatentDiffError: a picture cannot be read.
        """
        images: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
        return self.latents_of(load_images(images, size or (self.image_size, self.image_size)))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, c, h, w) to pictures."""
        return [image for one in range(len(latents)) for image in to_images(self.pixels(latents[one : one + 1]))]

    def pixels(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) to pixels (B, 3, H, W) in about [-1, 1], float32; differentiable."""
        pixels = self.vae.decode(latents.to(self.vae.decoder.conv_in.weight.dtype)).float()
        if not bool(pixels.detach().isfinite().all()):
            warnings.warn("a picture is not finite: try dtype=torch.float32 for the VAE", RuntimeWarning, stacklevel=3)
        return pixels

    def invert(
        self, image: Picture, prompt: str = "", *, num_steps: int = 100, guidance_scale: float = 1.0
    ) -> Inversion:
        """The noise from which `ddim` draws a picture (see latentdiff/sampling/editing.py)."""
        return editing.invert(self, image, prompt, num_steps=num_steps, guidance_scale=guidance_scale)

    def interpolate(self, a: Any, b: Any, n: int = 8, **options: Unpack[Options]) -> list[Image.Image]:
        """`n` pictures from one end to the other (see latentdiff/sampling/editing.py)."""
        return editing.interpolate(self, a, b, n, **options)

    def exaggerate(
        self, prompt: str, feature: str | tuple[str, str], amount: float = 1.0, **options: Any
    ) -> list[Image.Image]:
        """Draw a prompt with more, or less, of a feature (see latentdiff/sampling/editing.py)."""
        return editing.exaggerate(self, prompt, feature, amount, **options)

    def _draw(self, prompts: list[str], recipe: Recipe, source: Source | None = None) -> list[Image.Image]:
        seeds = recipe.seeds(len(prompts) * recipe.num_images)
        images = draw_batches(self, self.features(prompts, recipe), seeds, recipe, source)
        for place, image in enumerate(images):
            facts = recipe.facts(prompts, place, seeds[place])
            image.info[RECIPE_KEY] = json.dumps(facts if source is None else {**facts, "strength": source.strength})
        return images

    def latent_shape(self, recipe: Recipe) -> tuple[int, int, int]:
        """(c, h, w) of what the recipe draws."""
        factor = self.vae.config.downsampling
        return (self.unet.config.in_channels, *recipe.latent_size(factor, self.image_size // factor))

    def latents_of(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] to latents (B, c, h, w), float32."""
        weights = self.vae.decoder.conv_in.weight
        with torch.no_grad():
            return self.vae.encode(pixels.to(weights.device, weights.dtype)).float()

    def pixel_size(self, recipe: Recipe) -> tuple[int, int]:
        """Height and width of what the recipe draws."""
        factor = self.vae.config.downsampling
        _, height, width = self.latent_shape(recipe)
        return height * factor, width * factor
