"""Training of the autoencoder: reconstruction, KL, perceptual, adversarial (arXiv 2112.10752, appendix G)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vae import VAE, DiagonalGaussian

from ..data.batches import PixelBatch, PixelBatches, micro_batches
from ..data.cache import read_pixels, to_pixels
from ..data.order import BatchPlan
from ..data.pictures import PictureError
from ..data.sources import Source
from ..evaluation.grid import comparison_grid
from ..evaluation.metrics import psnr, ssim
from ..sections import DataConfig
from .discriminator import Discriminator, discriminator_loss, generator_loss
from .launch import Launch
from .logging import Record
from .loop import run_facts
from .optimizer import Updater
from .parallel import distributed, no_sync
from .perceptual import PerceptualLoss
from .vae_losses import adaptive_weight, load_perceptual, reconstruction_nll


class Autoencoder(nn.Module):
    """The VAE and the decoder's variance, as one module."""

    def __init__(self, vae: VAE, learn_variance: bool) -> None:
        super().__init__()
        self.vae = vae
        self.log_variance = nn.Parameter(torch.zeros(()), requires_grad=learn_variance)

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction through a draw from the posterior, and the posterior's mean and log-variance."""
        reconstruction, posterior = self.vae(pixels, noise)
        return reconstruction, posterior.mean, posterior.logvar


class VAETraining:
    """The task: `learn`, `validate`, and what a checkpoint holds. See `loop.Task`."""

    name = "train_vae"

    def __init__(self, run: Launch, folder: Path, sources: tuple[Source, Source], vae: VAE) -> None:
        config, section = run.config, run.config.train_vae
        self.run, self.folder, self.section = run, folder, section
        self.train_source, self.held_out = sources
        self.num_pictures = len(self.train_source)
        if section.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        self.inner = Autoencoder(vae, section.learn_variance).to(run.device).train()
        self.model = distributed(self.inner, run, section)
        self.perceptual, sentence = load_perceptual(section.perceptual_weights)
        self.perceptual.to(run.device)
        run.report(sentence)
        fp16 = run.precision == "fp16"
        trained = {name: p for name, p in self.inner.named_parameters() if p.requires_grad}
        self.updaters = {"vae": Updater([(trained, section.learning_rate)], section, fp16=fp16)}
        if section.adversarial_weight > 0:
            self.inner_critic = Discriminator(section.discriminator_width, section.discriminator_layers).to(run.device)
            self.critic = distributed(self.inner_critic, run, section)
            rate = section.discriminator_learning_rate
            self.updaters["critic"] = Updater([(dict(self.inner_critic.named_parameters()), rate)], section, fp16=fp16)
        size = config.data.image_size // vae.config.downsampling
        self.latent_shape = (vae.config.latent_channels, size, size)
        self.plan = BatchPlan(section.batch_size, run.accelerator.process_index, run.accelerator.num_processes,
                              section.micro_batch_size)  # fmt: skip
        self.facts = {**run_facts(run, "vae", "train_vae"), "pictures": len(self.train_source)}

    def batches(self, start: int, stop: int) -> Iterator[list[PixelBatch]]:
        """The micro-batches of steps start ... stop - 1."""
        config = self.run.config
        dataset = PixelBatches(self.train_source, config.data, self.plan, config.seed, self.latent_shape)
        return micro_batches(dataset, self.plan, start, stop, config.workers, self.run.device.type == "cuda")

    def learn(self, batches: list[PixelBatch], step: int, record: Record) -> tuple[dict[str, Tensor], Tensor]:
        """One step of the autoencoder, and of the discriminator once it takes part: both move, or neither."""
        playing = "critic" in self.updaters and step >= self.section.adversarial_start
        sums: dict[str, Tensor] = {}
        with record.phase("model"):
            for number, batch in enumerate(batches):
                last = number == len(batches) - 1
                pixels = to_pixels(batch.images.to(self.run.device, non_blocking=True))
                metrics, reconstruction = self._autoencode(pixels, batch.noise, playing, last, len(batches))
                if playing:
                    metrics["critic_loss"] = self._criticise(pixels, reconstruction, last, len(batches))
                for name, value in metrics.items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value / len(batches)
        with record.phase("optimizer"):
            active = [self.updaters["vae"], *([self.updaters["critic"]] if playing else [])]
            norms = [updater.gradient_norm() for updater in active]
            moves = torch.stack(norms).isfinite().all().float()
            for updater, norm in zip(active, norms, strict=True):
                updater.update(step, norm, moves)
        sums["norm"] = norms[0]
        return sums, moves

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """PSNR, SSIM and the perceptual term on held-out pictures, without noise; EMA and raw; and a grid of some."""
        updater = self.updaters["vae"]
        self.inner.eval()
        raw = self._quality()[0]
        with updater.ema.swapped([tensor.detach() for tensor in updater.local.values()]):
            averaged, shown = self._quality()
        self.inner.train()
        values = {f"validation_{name}": value for name, value in averaged.items()}
        values |= {f"validation_{name}_raw": value for name, value in raw.items()}
        if self.run.is_main and shown:
            path = self.folder / "reconstructions" / f"step-{step:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            comparison_grid(*(torch.stack(pictures) for pictures in zip(*shown, strict=True))).save(path)
        line = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.run.report(f"{self.name} {step}: {line}; pictures in {self.folder / 'reconstructions'}")
        return values

    def finish(self) -> tuple[VAE, float]:
        """The averaged VAE, and the log-variance of its decoder."""
        average = self.updaters["vae"].named("ema")
        self.inner.load_state_dict({**self.inner.state_dict(), **average})
        self.inner.vae.enable_gradient_checkpointing(False)
        return self.inner.vae.eval(), float(self.inner.log_variance.detach())

    def _autoencode(
        self, pixels: Tensor, noise: Tensor, playing: bool, last: bool, parts: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients of one micro-batch for the autoencoder. Losses are a mean over values, so 1 / (C H W) of LDM's."""
        section, updater = self.section, self.updaters["vae"]
        with no_sync(self.model, last=last):
            with self.run.autocast():
                reconstruction, mean, logvar = self.model(pixels, noise.to(self.run.device, non_blocking=True))
                perceptual = self.perceptual(pixels, reconstruction) * section.perceptual_weight
            values = pixels[0].numel()
            nll = reconstruction_nll(
                pixels, reconstruction, self.inner.log_variance, section.reconstruction, perceptual
            )
            kl = DiagonalGaussian(mean, logvar).kl().mean()
            fit = nll.mean() / values
            loss = fit + section.kl_weight * kl / values
            metrics = {"loss": loss, "perceptual": perceptual.mean(), "kl": kl}
            if playing:
                self.inner_critic.requires_grad_(False)
                with self.run.autocast():
                    fooled = generator_loss(self.inner_critic(reconstruction).float())
                self.inner_critic.requires_grad_(True)
                weight = self._adaptive_weight(fit, fooled)
                loss = loss + section.adversarial_weight * weight * fooled
                metrics |= {"generator_loss": fooled, "adaptive_weight": weight}
            torch.autograd.backward(loss * updater.loss_scale / parts)
        metrics["l1"] = (pixels - reconstruction.float()).abs().mean()
        return {name: value.detach() for name, value in metrics.items()}, reconstruction.detach()

    def _criticise(self, pixels: Tensor, reconstruction: Tensor, last: bool, parts: int) -> Tensor:
        """Gradients of one micro-batch for the discriminator."""
        with no_sync(self.critic, last=last):
            with self.run.autocast():
                real, fake = self.critic(torch.cat([pixels, reconstruction.to(pixels.dtype)])).float().chunk(2)
            loss = discriminator_loss(real, fake)
            torch.autograd.backward(loss * self.updaters["critic"].loss_scale / parts)
        return loss.detach()

    def _adaptive_weight(self, fit: Tensor, fooled: Tensor) -> Tensor:
        """From gradients averaged over the processes, so that any number of them weighs alike."""
        last_layer = self.inner.vae.decoder.conv_out.weight
        scale = self.updaters["vae"].loss_scale
        grads = [torch.autograd.grad(loss * scale, last_layer, retain_graph=True)[0] for loss in (fit, fooled)]
        fit_grad, fooled_grad = self.run.accelerator.reduce(torch.stack(grads) / scale, "mean")
        return adaptive_weight(fit_grad, fooled_grad)

    def _quality(self) -> tuple[dict[str, float], list[tuple[Tensor, Tensor]]]:
        """Means over the held-out pictures, which the processes share; and this one's pictures with reconstructions."""
        settings, accelerator = self.run.config.validation, self.run.accelerator
        count = min(settings.num_pictures, len(self.held_out))
        sums = torch.zeros(4, dtype=torch.float64, device=self.run.device)
        shown: list[tuple[Tensor, Tensor]] = []
        for number, start in enumerate(range(0, count, settings.batch_size)):
            if number % accelerator.num_processes != accelerator.process_index:
                continue
            chosen = range(start, min(start + settings.batch_size, count))
            pixels = pixels_of(self.held_out, chosen, self.run.config.data).to(self.run.device)
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


def pixels_of(source: Source, indices: range, config: DataConfig) -> Tensor:
    """The readable ones of some pictures, (B, 3, H, W); `latentdiff data check` lists the others."""
    images = []
    for index in indices:
        try:
            images.append(read_pixels(source, index, config))
        except PictureError:
            continue
    size = config.image_size
    return to_pixels(torch.from_numpy(np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8)))
