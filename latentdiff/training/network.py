"""What latent training trains, as one module, and the frozen models around it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from text_encoder import TextEncoder
from unet import Denoiser
from unet.experts import Calls
from unet.trajectory import History
from vae import VAE

from ..data.batches import LatentBatch, RawBatch, Tokens
from ..data.pictures import to_pixels

Also = History | Calls | None  # the earlier steps that a UNet sees, or which of several experts predict which rows


class LatentModel(nn.Module):
    """Everything that is trained, as a single module for DDP or FSDP to wrap."""

    def __init__(self, unet: Denoiser, text_encoder: TextEncoder | None) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder  # None if it is frozen; features are then passed in

    def forward(self, x: Tensor | None, t: Tensor | None, text: Tensor | Tokens, also: Also = None) -> Any:
        """Predict at x (B, c, h, w) and t (B,) from features (B, L, D) or tokens; without x, return the features."""
        context = text if isinstance(text, Tensor) else cast(TextEncoder, self.text_encoder).encode(*text)
        return context if x is None else self.unet(x, t, context, also)


class FullModelNetwork:
    """Adapter of a `LatentModel` to the sampling loop; FSDP gathers parameters only when the full model is called."""

    def __init__(self, model: LatentModel) -> None:
        self.model = model

    def project_context(self, context: Tensor) -> Tensor:
        """Return the context unchanged."""
        return context

    def project_time(self, t: Tensor) -> list[Tensor]:
        """Return the timesteps unchanged."""
        return [t]

    def start_history(self) -> History | None:
        """See `UNet.start_history`."""
        return self.model.unet.start_history()

    def __call__(self, x: Tensor, t: list[Tensor], context: Tensor, history: History | None = None) -> Any:
        """Predict at x (B, c, h, w)."""
        return self.model(x, t[0].expand(len(x)), context, history)


@dataclass(frozen=True)
class FrozenParts:
    """The frozen models, which turn a batch into inputs for the trained one."""

    vae: VAE
    text_encoder: TextEncoder | None  # None if it is trained, as part of the model
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]

    def prepare(self, batch: LatentBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return x0 (B, c, h, w), noise of the same shape and t (B,) on the device; uncached images are encoded."""
        t, noise = (part.to(self.device, non_blocking=True) for part in (batch.t, batch.noise))
        if not isinstance(batch, RawBatch):
            return batch.x0.to(self.device, non_blocking=True), noise, t
        images, eps = (part.to(self.device, non_blocking=True) for part in (batch.images, batch.posterior_noise))
        with torch.no_grad(), self.autocast():
            posterior = self.vae.latent_posterior(to_pixels(images))
        return posterior.reparameterize(eps).float(), noise, t

    def text(self, batch: LatentBatch) -> list[Tensor]:
        """Return the text features (B, L, D) on the device, or tokens and mask."""
        parts = [batch.text] if isinstance(batch.text, Tensor) else batch.text
        return [part.to(self.device, non_blocking=True) for part in parts]

    def chain(self, batch: LatentBatch) -> list[Tensor]:
        """Return the parts of the batch's chain on the device, if it has one."""
        return [part.to(self.device, non_blocking=True) for part in batch.chain or ()]

    def predict(
        self, model: nn.Module, x_t: Tensor | None, t: Tensor | None, parts: Sequence[Tensor], also: Also = None
    ) -> Any:
        """Return what a `LatentModel`, wrapped or not, returns at x_t, from what `text` returns."""
        text: Tensor | Tokens = parts[0] if len(parts) == 1 else Tokens(*parts)
        with self.autocast():
            if isinstance(text, Tokens) and self.text_encoder is not None:
                with torch.no_grad():
                    text = self.text_encoder.encode(*text)
            return model(x_t, t, text.float() if isinstance(text, Tensor) else text, also)
