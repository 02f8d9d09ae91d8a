"""A model's parts together: prompts to features, features and noise to latents, latents to pictures and back."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from text_encoder import TextEncoder
from unet import UNet
from vae import VAE

from ..data.pictures import to_images
from ..diffusion.process import Prediction, Process, check_prediction
from ..diffusion.samplers import Spacing, Step
from ..diffusion.schedule import Schedule
from ..errors import LatentDiffError
from .images import Picture, load_images
from .loop import Features, InitImage, Network, SeededNoise, last, sample_latents
from .prompts import text_features
from .settings import SamplingSettings


class ModelParts:
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
        final_sigma_zero: bool = True,
    ) -> None:
        """Put the parts together.

        Args:
            vae: between pixels and latents.
            unet: predicts from noisy latents.
            text_encoder: prompts to features, as wide as the UNet's context.
            schedule: the forward process the UNet was trained on.
            prediction: what the UNet predicts.
            spacing: of the timesteps that are sampled.
            offset: of leading spacing.
            final_sigma_zero: False ends at the noise level of t = 0, as the original Stable Diffusion does.

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
        self.process = Process(schedule, prediction, spacing, offset, final_sigma_zero)
        self.network: Network = unet  # compiled or not

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.unet.conv_in.weight.device

    @property
    def image_size(self) -> int:
        """Pixels along one side of the pictures that are sampled by default."""
        return (self.unet.config.sample_size or 32) * self.vae.config.downsampling

    def latent_shape(self, settings: SamplingSettings) -> tuple[int, int, int]:
        """(c, h, w) of what the settings ask for."""
        factor = self.vae.config.downsampling
        return (self.unet.config.in_channels, *settings.latent_size(factor, self.image_size // factor))

    def pixel_size(self, settings: SamplingSettings) -> tuple[int, int]:
        """Height and width of what the settings ask for."""
        factor = self.vae.config.downsampling
        _, height, width = self.latent_shape(settings)
        return height * factor, width * factor

    def features(self, prompts: Sequence[str], settings: SamplingSettings) -> Features:
        """Text features of every picture to sample."""
        with torch.set_grad_enabled(settings.enable_grad):
            wanted, unwanted = (
                [prompt for prompt in texts for _ in range(settings.num_images)]
                for texts in (prompts, settings.negatives(len(prompts)))
            )
            context = text_features(self.text_encoder, wanted)
            guided = settings.guidance_scale != 1
            return Features(context, text_features(self.text_encoder, unwanted) if guided else None)

    def steps(
        self, features: Features, seeds: Sequence[int], settings: SamplingSettings, init: InitImage | None = None,
        *, first: int = 0,
    ) -> Iterator[Step]:  # fmt: skip
        """Sample pictures together, yielding after every step.

        Args:
            features: of each picture.
            seeds: of each picture.
            settings: how to sample.
            init: a picture to start from.
            first: place of the first picture among `settings.latents`.
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
    ) -> list[Image.Image]:
        """Sample any number of pictures, `settings.batch_size` at a time; arguments as of `steps`."""
        images: list[Image.Image] = []
        with tqdm(total=len(seeds), unit=" pictures", disable=None if settings.progress else True) as bar:
            for first in range(0, len(seeds), settings.batch_size):
                part = slice(first, first + settings.batch_size)
                steps = self.steps(features.part(part), seeds[part], settings, init, first=first)
                images += self.decode(last(steps).x)
                bar.update(len(seeds[part]))
        return images

    @torch.no_grad()
    def encode(self, image: Picture | Sequence[Picture], *, size: tuple[int, int] | None = None) -> Tensor:
        """Pictures to latents (B, c, h, w), float32: the posterior's mode of the middle square, resized.

        Raises:
            LatentDiffError: a picture cannot be read.
        """
        images: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
        return self.latents_of(load_images(images, size or (self.image_size, self.image_size)))

    @torch.no_grad()
    def latents_of(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] to latents (B, c, h, w), float32."""
        return self.vae.encode(pixels.to(self.vae.decoder.conv_in.weight)).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, c, h, w) to pictures."""
        return [image for one in torch.split(latents, 1) for image in to_images(self.pixels(one))]

    def pixels(self, latents: Tensor) -> Tensor:
        """Latents (B, c, h, w) to pixels (B, 3, H, W) in about [-1, 1], float32; differentiable."""
        pixels = self.vae.decode(latents.to(self.vae.decoder.conv_in.weight.dtype)).float()
        if not bool(pixels.detach().isfinite().all()):
            warnings.warn("a picture is not finite: try dtype=torch.float32 for the VAE", RuntimeWarning, stacklevel=3)
        return pixels
