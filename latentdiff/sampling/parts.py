"""The parts of a model combined: prompts to features, features and noise to latents, latents to images and back."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from text_encoder import TextEncoder
from unet import Denoiser
from vae import VAE

from ..data.pictures import to_images
from ..device import without_tf32
from ..diffusion.process import Prediction, Process, check_prediction
from ..diffusion.samplers import Spacing, Step
from ..diffusion.schedule import Schedule
from ..errors import LatentDiffError
from .graphs import Graphs, decode, graphed
from .images import Picture, load_images
from .loop import Features, InitImage, Network, SeededNoise, last, sample_latents
from .prompts import text_features
from .settings import SamplingSettings

DECODED_TOGETHER = 2**20  # pixels, on a GPU: a picture of 1024 x 1024, or sixteen of 256 x 256


class ModelParts:
    """VAE, UNet, text encoder and noise schedule, in evaluation mode on one device."""

    def __init__(
        self,
        *,
        vae: VAE,
        unet: Denoiser,
        text_encoder: TextEncoder,
        schedule: Schedule,
        prediction: Prediction = "v",
        spacing: Spacing = "trailing",
        offset: int = 0,
        final_sigma_zero: bool = True,
    ) -> None:
        """Combine the parts of a model; raise LatentDiffError if they do not fit together.

        Args:
            vae: maps between pixels and latents.
            unet: denoises latents; one, or experts for bands of the timesteps.
            text_encoder: maps prompts to text features, as wide as the UNet's context.
            schedule: the noise schedule that the UNet was trained with.
            prediction: what the UNet predicts: `eps`, `x0`, `v` or `mean`.
            spacing: of the timesteps to sample at: `trailing`, `leading` or `linspace`.
            offset: added to the timesteps of `leading` spacing.
            final_sigma_zero: False ends at the noise level of t = 0, as the original Stable Diffusion does.
        """
        check_prediction(prediction, schedule)
        for what, found, expected in (
            ("the text encoder's width and the UNet's context_dim", text_encoder.context_dim, unet.config.context_dim),
            ("the latent channels and the UNet's in_channels", vae.config.latent_channels, unet.config.in_channels),
            ("the UNet's out_channels and in_channels", unet.config.out_channels, unet.config.in_channels),
        ):
            if found != expected:
                raise LatentDiffError(f"{what} differ ({found} and {expected}): not parts of one model")
        self.vae, self.unet, self.text_encoder = vae.eval(), unet.eval(), text_encoder.eval()
        self.process = Process(schedule, prediction, spacing, offset, final_sigma_zero)
        self.graphs = Graphs()
        self.folder: Path | None = None  # that the model was opened from
        self.proposals: Any = None  # `evaluation.proposal.Proposals`, once read or measured
        self.network: Network = graphed(unet, self.graphs)  # the compiled UNet after `compile()`

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.unet.conv_in.weight.device

    @property
    def image_size(self) -> int:
        """Default height and width of sampled images, in pixels."""
        return (self.unet.config.sample_size or 32) * self.vae.config.downsampling

    def latent_shape(self, settings: SamplingSettings) -> tuple[int, int, int]:
        """Return the latent shape (c, h, w) that the settings ask for."""
        factor = self.vae.config.downsampling
        return (self.unet.config.in_channels, *settings.latent_size(factor, self.image_size // factor))

    def pixel_size(self, settings: SamplingSettings) -> tuple[int, int]:
        """Return the height and width in pixels that the settings ask for."""
        factor = self.vae.config.downsampling
        _, height, width = self.latent_shape(settings)
        return height * factor, width * factor

    def features(self, prompts: Sequence[str], settings: SamplingSettings) -> Features:
        """Encode prompts and negative prompts to text features, one of each per image to sample."""
        with torch.set_grad_enabled(settings.enable_grad):
            positive, negative = (
                [prompt for prompt in texts for _ in range(settings.num_images)]
                for texts in (prompts, settings.negatives(len(prompts)))
            )
            context = text_features(self.text_encoder, positive)
            guided = settings.guidance_scale != 1
            return Features(context, text_features(self.text_encoder, negative) if guided else None)

    def steps(
        self, features: Features, seeds: Sequence[int], settings: SamplingSettings, init: InitImage | None = None,
        *, first: int = 0,
    ) -> Iterator[Step]:  # fmt: skip
        """Sample a batch of images, yielding after every step.

        `features` and `seeds` have one entry per image; `first` is the index of the first image in `settings.latents`.
        """
        shape = self.latent_shape(settings)
        noise = SeededNoise(seeds, shape, self.device)
        start = settings.initial_noise(slice(first, first + len(seeds)), shape)
        start = None if start is None else start.to(self.device, torch.float32)
        graph = torch.enable_grad() if settings.enable_grad else torch.no_grad()
        network, weights = self.unet if settings.enable_grad else self.network, self.unet.conv_in.weight
        return graph(sample_latents)(network, self.process, features.to(weights), settings, noise, start=start,
                                     init=init)  # fmt: skip

    def sample_images(
        self, features: Features, seeds: Sequence[int], settings: SamplingSettings, init: InitImage | None = None
    ) -> Iterator[Image.Image]:
        """Sample any number of images, `settings.batch_size` at a time, yielding each; see `steps` for the arguments.

        Raises LatentDiffError if the latents are not finite.
        """
        with tqdm(total=len(seeds), unit=" pictures", disable=None if settings.progress else True) as bar:
            for first in range(0, len(seeds), settings.batch_size):
                part = slice(first, first + settings.batch_size)
                steps = self.steps(features.part(part), seeds[part], settings, init, first=first)
                latents = last(steps).x
                if not bool(latents.isfinite().all()):
                    raise LatentDiffError(self.not_finite("the sampled latents"))
                yield from self.decode(latents)
                bar.update(len(seeds[part]))

    @torch.no_grad()
    def encode(self, image: Picture | Sequence[Picture], *, size: tuple[int, int] | None = None) -> Tensor:
        """Encode one or more images to latents (B, c, h, w), float32, the mode of the VAE's posterior.

        Images are center-cropped and resized to `size` (height, width), by default the model's.
        """
        images: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
        return self.latents_of(load_images(images, size or (self.image_size, self.image_size)))

    @torch.no_grad()
    @without_tf32()
    def latents_of(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] to latents (B, c, h, w), float32."""
        return self.vae.encode(pixels.to(self.vae.decoder.conv_in.weight)).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Decode latents (B, c, h, w) to images."""
        pixels = latents[0, 0].numel() * self.vae.config.downsampling**2
        several = max(1, DECODED_TOGETHER // pixels) if latents.device.type == "cuda" else 1
        return [image for part in torch.split(latents, several) for image in to_images(self.pixels(part))]

    def pixels(self, latents: Tensor) -> Tensor:
        """Decode latents (B, c, h, w) to pixels (B, 3, H, W), roughly in [-1, 1], float32; differentiable."""
        latents = latents.to(self.vae.decoder.conv_in.weight.dtype)
        pixels = decode(self.graphs, self.vae, latents).float()
        if not bool(pixels.detach().isfinite().all()):
            warnings.warn(self.not_finite("the decoded pixels"), RuntimeWarning, stacklevel=3)
        return pixels

    def not_finite(self, what: str) -> str:
        """Say that something is not finite, and what may help."""
        for name, part in (("UNet", self.unet), ("VAE", self.vae), ("text encoder", self.text_encoder)):
            for key, parameter in part.named_parameters():
                if not bool(parameter.detach().isfinite().all()):
                    return f"{what} are not finite, as the weights of the {name} are not ({key})"
        if self.unet.conv_in.weight.dtype == self.vae.decoder.conv_in.weight.dtype == torch.float32:
            return f"{what} are not finite, though all weights are: a training that diverged, or extreme settings"
        return f"{what} are not finite: try dtype=torch.float32 (--precision fp32)"
