"""VAE training: reconstruction, KL, perceptual and adversarial losses (arXiv 2112.10752, appendix G)."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vae import VAE, DiagonalGaussian

from ..data.batches import PixelBatch, PixelBatches, micro_batches
from ..data.cache import read_pixels
from ..data.pictures import PictureError, to_pixels
from ..data.sources import Source
from ..evaluation.grid import comparison_grid
from ..evaluation.metrics import psnr, ssim
from ..sections import DataConfig, TrainVAESection
from .best import Best
from .budget import no_limit, seconds_of
from .discriminator import Discriminator, discriminator_loss, generator_loss
from .fingerprint import fingerprint
from .graphs import GradientGraph, Parts
from .launch import Launch
from .logging import MetricLogger
from .optimizer import TrainState
from .parallel import distributed, evaluation_mode, no_sync
from .perceptual import PerceptualLoss
from .snapshots import Snapshots
from .spikes import Spikes
from .timetable import Timetable
from .vae_losses import adaptive_weight, load_perceptual, reconstruction_nll

POOR = 18.0  # dB: reconstructions without shapes and colors that one could name


class Autoencoder(nn.Module):
    """The VAE and the decoder's learned variance as one module."""

    def __init__(self, vae: VAE, learn_variance: bool) -> None:
        super().__init__()
        self.vae = vae
        self.log_variance = nn.Parameter(torch.zeros(()), requires_grad=learn_variance)

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction from a posterior sample, and the posterior's mean and log-variance."""
        reconstruction, posterior = self.vae(pixels, noise)
        return reconstruction, posterior.mean, posterior.logvar


@dataclass(frozen=True)
class AutoencoderLosses:
    """The losses of autoencoder and discriminator, averaged over values: 1 / (C H W) times LDM's."""

    inner: Autoencoder
    model: nn.Module  # `inner`, wrapped in DDP if there are several processes
    inner_discriminator: Discriminator | None
    discriminator: nn.Module | None  # `inner_discriminator`, likewise
    perceptual: nn.Module
    section: TrainVAESection
    autocast: Callable[[], AbstractContextManager[Any]]
    average: Callable[[Tensor], Tensor]  # over processes

    def autoencoder(
        self, pixels: Tensor, noise: Tensor, loss_scale: Tensor, *, use_discriminator: bool
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return loss, metrics and reconstruction for pixels (B, 3, H, W) and posterior noise (B, c, h, w)."""
        with self.autocast():
            reconstruction, mean, logvar = self.model(pixels, noise)
            perceptual = self.perceptual(pixels, reconstruction) * self.section.perceptual_weight
        num_values = pixels[0].numel()
        nll = reconstruction_nll(
            pixels, reconstruction, self.inner.log_variance, self.section.reconstruction, perceptual
        )
        kl = DiagonalGaussian(mean, logvar).kl().mean()
        reconstruction_loss = nll.mean() / num_values
        loss = reconstruction_loss + self.section.kl_weight * kl / num_values
        metrics = {"loss": loss, "perceptual": perceptual.mean(), "kl": kl}
        if use_discriminator and self.inner_discriminator is not None:
            self.inner_discriminator.requires_grad_(False)
            with self.autocast():
                adversarial_loss = generator_loss(self.inner_discriminator(reconstruction).float())
            self.inner_discriminator.requires_grad_(True)
            weight = self._adaptive_weight(reconstruction_loss, adversarial_loss, loss_scale)
            loss = loss + self.section.adversarial_weight * weight * adversarial_loss
            metrics |= {"generator_loss": adversarial_loss, "adaptive_weight": weight}
        metrics["l1"] = (pixels - reconstruction.detach().float()).abs().mean()
        return loss, {name: value.detach() for name, value in metrics.items()}, reconstruction.detach()

    def discriminate(self, pixels: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the discriminator's loss, ()."""
        assert self.discriminator is not None
        with self.autocast():
            logits = self.discriminator(torch.cat([pixels, reconstruction.to(pixels.dtype)])).float()
        return discriminator_loss(*logits.chunk(2))

    def _adaptive_weight(self, reconstruction_loss: Tensor, adversarial_loss: Tensor, loss_scale: Tensor) -> Tensor:
        """Average the gradients over processes, so that the weight does not depend on their number."""
        last_layer = self.inner.vae.decoder.conv_out.weight
        grads = [
            torch.autograd.grad(loss * loss_scale, last_layer, retain_graph=True)[0]
            for loss in (reconstruction_loss, adversarial_loss)
        ]
        return adaptive_weight(*self.average(torch.stack(grads) / loss_scale))


class VAETraining:
    """VAE training as a `loop.Training`."""

    name = "train_vae"

    def __init__(self, run: Launch, folder: Path, sources: tuple[Source, Source], vae: VAE) -> None:
        config, section = run.config, run.config.train_vae
        self.run, self.folder, self.section = run, folder, section
        self.timetable = Timetable(section, self.name, has_budget=config.budget is not None)
        self.best: Best | None = None
        self.spikes = Spikes(run, section.max_spike)
        self.source, self.held_out = sources
        if section.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        self.inner = Autoencoder(vae, section.learn_variance).to(run.device).train()
        self.model = distributed(self.inner, run, section)
        self.perceptual, sentence = load_perceptual(section.perceptual_weights)
        self.perceptual.to(run.device)
        run.report(sentence)
        fp16 = run.precision == "fp16"
        trained = {name: p for name, p in self.inner.named_parameters() if p.requires_grad}
        self.states = {"vae": TrainState([(trained, section.learning_rate)], section, self.timetable, fp16=fp16)}
        self.snapshots = Snapshots(run, folder, 0, self.timetable, self.states["vae"])  # none of a VAE
        inner_discriminator, self.discriminator = None, None
        if section.adversarial_weight > 0:
            inner_discriminator = Discriminator(section.discriminator_width, section.discriminator_layers)
            self.discriminator = distributed(inner_discriminator.to(run.device), run, section)
            group = (dict(inner_discriminator.named_parameters()), section.discriminator_learning_rate)
            self.states["discriminator"] = TrainState([group], section, self.timetable, fp16=fp16)
        self.losses = AutoencoderLosses(self.inner, self.model, inner_discriminator, self.discriminator,
                                        self.perceptual, section, run.autocast,
                                        lambda gradients: run.accelerator.reduce(gradients, "mean"))  # fmt: skip
        self.graph = GradientGraph(run, section, self.states)
        size = config.data.image_size // vae.config.downsampling
        self.latent_shape = (vae.config.latent_channels, size, size)
        self.plan = run.batch_plan(section)
        self.fingerprint = {**fingerprint(run, "vae", "train_vae"), "pictures": len(self.source),
                            "recipe_steps": section.steps if config.budget is not None else None}  # fmt: skip

    def batches(self, start: int, stop: int) -> Iterator[list[PixelBatch]]:
        """Yield the list of micro-batches of each step from `start` to `stop` - 1, counted from 0."""
        config = self.run.config
        dataset = PixelBatches(self.source, config.data, self.plan, config.seed, self.latent_shape)
        return micro_batches(dataset, self.plan, start, stop, config.workers, self.run.device.type == "cuda")

    def train_step(self, batches: list[PixelBatch], step: int, log: MetricLogger) -> tuple[dict[str, Tensor], Tensor]:
        """Take one step, counted from 1, of the autoencoder, and of the discriminator from `adversarial_start` on.

        Returns scalar metrics, and a scalar that is 1 if the step was finite and updated the weights, else 0.
        """
        discriminator = (
            self.discriminator if step >= self.timetable.first_step(self.section.adversarial_start) else None
        )
        states = [state for name, state in self.states.items() if name == "vae" or discriminator is not None]
        with log.phase("model"):
            parts: Parts = [tuple(part.to(self.run.device, non_blocking=True) for part in (batch.images, batch.noise))
                            for batch in batches]  # fmt: skip
            metrics = self.graph(partial(self._gradients, discriminator), parts, kind=discriminator is not None)
        with log.phase("optimizer"):
            norms = [state.gradient_norm() for state in states]
            step_is_finite = torch.stack(norms).isfinite().all().float()
            step_is_finite = self.spikes.accept(step, metrics["l1"], step_is_finite)
            for state, norm in zip(states, norms, strict=True):
                state.update(step, norm, step_is_finite)
        return {**metrics, "norm": norms[0]}, step_is_finite

    def _gradients(self, discriminator: nn.Module | None, parts: Parts) -> dict[str, Tensor]:
        """Leave the gradients of micro-batches (images, noise) in the weights; return their mean metrics."""
        metrics: dict[str, Tensor] = {}
        scale = self.states["vae"].loss_scale
        for number, (images, noise) in enumerate(parts):
            last, pixels = number == len(parts) - 1, to_pixels(images)
            with no_sync(self.model, last=last):
                loss, found, reconstruction = self.losses.autoencoder(
                    pixels, noise, scale, use_discriminator=discriminator is not None
                )
                torch.autograd.backward(loss * scale / len(parts))
            if discriminator is not None:
                with no_sync(discriminator, last=last):
                    loss = self.losses.discriminate(pixels, reconstruction)
                    torch.autograd.backward(loss * self.states["discriminator"].loss_scale / len(parts))
                found["discriminator_loss"] = loss.detach()
            for name, value in found.items():
                metrics[name] = metrics.get(name, torch.zeros_like(value)) + value / len(parts)
        return metrics

    def validate(self, step: int, check_time: Callable[[], None]) -> dict[str, float]:
        """Compute PSNR, SSIM and perceptual loss of held-out reconstructions, with EMA and raw weights; save a grid."""
        state = self.states["vae"]
        with evaluation_mode(self.inner):
            raw = self._evaluate(check_time)[0]
            with state.ema.swapped([tensor.detach() for tensor in state.local.values()]):
                averaged, shown = self._evaluate(check_time)
        values = {f"validation_{name}": value for name, value in averaged.items()}
        values |= {f"validation_{name}_raw": value for name, value in raw.items()}
        if self.run.is_main and shown:
            path = self.folder / "reconstructions" / f"step-{step:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            comparison_grid(*(torch.stack(pictures) for pictures in zip(*shown, strict=True))).save(path)
        line = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.run.report(f"{self.name} {step}: {line}; reconstructions in {self.folder / 'reconstructions'}")
        if step == self.timetable.steps and averaged.get("psnr", POOR) < POOR:
            self.run.report(f"warning: this VAE reconstructs held-out pictures at only {averaged['psnr']:.1f} dB, and "
                            "no UNet draws better than that; look at them, and train the VAE longer")  # fmt: skip
        return values

    def rehearse(self) -> float:
        """Estimate the seconds of `validate` from one batch."""
        with evaluation_mode(self.inner):
            self._evaluate(rounds=1)  # the first pass prepares
            batch = seconds_of(lambda: self._evaluate(rounds=1))
        settings = self.run.config.validation
        count = min(settings.num_pictures, len(self.held_out))
        return 2 * batch * math.ceil(count / settings.batch_size / self.run.accelerator.num_processes)

    def finish(self) -> tuple[VAE, float]:
        """Return the averaged VAE and the log-variance of its decoder."""
        average = self.states["vae"].named("ema")
        self.inner.load_state_dict({**self.inner.state_dict(), **average})
        self.inner.vae.enable_gradient_checkpointing(False)
        return self.inner.vae.eval(), float(self.inner.log_variance.detach())

    def _evaluate(
        self, check_time: Callable[[], None] = no_limit, rounds: int | None = None
    ) -> tuple[dict[str, float], list[tuple[Tensor, Tensor]]]:
        """Mean metrics over held-out images, split across processes, and up to 16 image-reconstruction pairs.

        In each round every process takes one batch.
        """
        settings, accelerator = self.run.config.validation, self.run.accelerator
        count = min(settings.num_pictures, len(self.held_out))
        sums = torch.zeros(4, dtype=torch.float64, device=self.run.device)
        shown: list[tuple[Tensor, Tensor]] = []
        most = None if rounds is None else rounds * accelerator.num_processes
        for number, start in enumerate(range(0, count, settings.batch_size)[:most]):
            check_time()
            if number % accelerator.num_processes != accelerator.process_index:
                continue
            chosen = range(start, min(start + settings.batch_size, count))
            pixels = load_pixels(self.held_out, chosen, self.run.config.data).to(self.run.device)
            if not len(pixels):
                continue
            with self.run.autocast():
                reconstruction = self.inner.vae(pixels)[0].float()
            shown += zip(pixels.cpu(), reconstruction.cpu(), strict=True)
            del shown[16:]
            measures = [measure(pixels, reconstruction).double() for measure in (psnr, ssim, self.perceptual)]
            sums += torch.stack([*(values.sum() for values in measures), sums.new_tensor(len(pixels))])
        total = accelerator.reduce(sums, "sum")
        values: list[float] = (total[:3] / total[3]).tolist()
        names = ("psnr", "ssim", "lpips" if isinstance(self.perceptual, PerceptualLoss) else "structural_loss")
        return dict(zip(names, values, strict=True)), shown


def load_pixels(source: Source, indices: range, config: DataConfig) -> Tensor:
    """Load images as (B, 3, H, W), skipping broken ones; `latentdiff data check` lists those."""
    images = []
    for index in indices:
        try:
            images.append(read_pixels(source, index, config))
        except PictureError:
            continue
    size = config.image_size
    return to_pixels(torch.from_numpy(np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8)))
