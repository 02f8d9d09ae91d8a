"""Latent training: the UNet, and the text encoder with it or frozen, on forward-noised latents."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from text_encoder import TextEncoder
from unet import UNet
from vae import VAE

from ..data.batches import LatentBatch, LatentBatches, RawBatch, Tokens, ValidationBatches, micro_batches
from ..data.cache import LatentCache, TextCache, weights_digest
from ..data.order import BatchPlan
from ..data.pictures import to_pixels
from ..data.shards import digest
from ..data.sources import Source
from ..diffusion.process import add_noise, diffusion_loss
from ..sampling.loop import Network
from .fingerprint import fingerprint
from .launch import Launch, wants_fsdp
from .logging import MetricLogger
from .optimizer import TrainState
from .parallel import gather_full, no_sync, sharded
from .preview import sample_preview

Caches = tuple[LatentCache | None, TextCache | None]


class LatentModel(nn.Module):
    """What is trained, as one module, so that DDP and FSDP see one."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder | None) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder  # None: frozen, its features come with the batch

    def forward(self, x: Tensor | None, t: Tensor | None, text: Tensor | Tokens) -> Tensor:
        """The prediction at x (B, c, h, w) and t (B,), for features (B, L, D) or tokens; without x, the features."""
        context = text if isinstance(text, Tensor) else cast(TextEncoder, self.text_encoder).encode(*text)
        return context if x is None else self.unet(x, cast(Tensor, t), context)


class WholeModel:
    """A `LatentModel` as the sampling loop sees a UNet; under FSDP only a call of the whole gathers its parameters."""

    def __init__(self, model: LatentModel) -> None:
        self.model = model

    def project_context(self, context: Tensor) -> Tensor:
        """Nothing is computed beforehand."""
        return context

    def project_time(self, t: Tensor) -> list[Tensor]:
        """The timesteps themselves."""
        return [t]

    def __call__(self, x: Tensor, t: list[Tensor], context: Tensor) -> Tensor:
        """The prediction."""
        return self.model(x, t[0].expand(len(x)), context)


@dataclass(frozen=True)
class FrozenParts:
    """What is not trained, and so prepares a batch."""

    vae: VAE
    text_encoder: TextEncoder | None  # None: it is trained, inside the model
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]

    def draw(self, batch: LatentBatch) -> tuple[Tensor, Tensor, Tensor]:
        """x0 (B, c, h, w), noise like it and t (B,): drawn when the batch was made, put on the device."""
        t, noise = (part.to(self.device, non_blocking=True) for part in (batch.t, batch.noise))
        if not isinstance(batch, RawBatch):
            return batch.x0.to(self.device, non_blocking=True), noise, t
        images, eps = (part.to(self.device, non_blocking=True) for part in (batch.images, batch.posterior_noise))
        with torch.no_grad(), self.autocast():
            posterior = self.vae.latent_posterior(to_pixels(images))
        return posterior.reparameterize(eps).float(), noise, t

    def predict(self, model: nn.Module, x_t: Tensor, t: Tensor, text: Tensor | Tokens) -> Tensor:
        """What a `LatentModel`, wrapped or not, predicts at x_t."""
        parts = [part.to(self.device, non_blocking=True) for part in ([text] if isinstance(text, Tensor) else text)]
        text = parts[0] if isinstance(text, Tensor) else Tokens(*parts)
        with self.autocast():
            if isinstance(text, Tokens) and self.text_encoder is not None:
                with torch.no_grad():
                    text = self.text_encoder.encode(*text)
            return model(x_t, t, text.float() if isinstance(text, Tensor) else text)


class LatentTraining:
    """`train_step`, `validate`, and what a checkpoint holds. See `loop.Training`."""

    name = "train_latent"

    def __init__(
        self,
        run: Launch,
        folder: Path,
        sources: tuple[Source, Source],
        vae: VAE,
        unet: UNet,
        text_encoder: TextEncoder,
        caches: tuple[Caches, Caches],
    ) -> None:
        config, section = run.config, run.config.train_latent
        self.run, self.folder, self.section = run, folder, section
        self.num_pictures = len(sources[0])
        self.schedule = config.diffusion.build().to(run.device)
        self.text_encoder, trains_text = text_encoder.to(run.device), config.text_encoder.train
        self.text_encoder.set_trainable(trains_text)
        if section.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.inner = LatentModel(unet, text_encoder if trains_text else None).train()
        self.model = sharded(self.inner, run, section)
        self.frozen = FrozenParts(vae.to(run.device).requires_grad_(False).eval(),
                                  None if trains_text else self.text_encoder, run.device, run.autocast)  # fmt: skip
        self.state = self._train_state()
        self.states: Mapping[str, TrainState] = {"model": self.state}
        size = config.data.image_size // vae.config.downsampling
        self.latent_shape = (vae.config.latent_channels, size, size)
        self.plan = run.batch_plan(section)
        self.rows = self._batches(sources[0], self.plan, caches[0], config.diffusion.caption_dropout, config.data.flip)
        held_out = self._batches(sources[1], BatchPlan(config.validation.batch_size), caches[1], 0.0, False)
        self.validation = ValidationBatches(held_out, config.validation.num_pictures, config.validation.timestep_bands)
        self.prompts = config.validation.prompts or first_captions(sources[1], 16)
        self.fingerprint = fingerprint(run, "vae", "text_encoder", "unet", "diffusion", "train_latent") | {
            "vae_weights": weights_digest(vae),
            "pictures": caches[0][0].shards.facts["pictures"] if caches[0][0] else len(sources[0]),
            "vocabulary": digest(text_encoder.tokenizer.get_vocab()),
        }
        if not trains_text:
            self.fingerprint["text_weights"] = weights_digest(text_encoder.model)

    def batches(self, start: int, stop: int) -> Iterator[list[LatentBatch]]:
        """The micro-batches of steps start ... stop - 1."""
        pin = self.run.device.type == "cuda"
        return micro_batches(self.rows, self.plan, start, stop, self.run.config.workers, pin)

    def train_step(self, batches: list[LatentBatch], step: int, log: MetricLogger) -> tuple[dict[str, Tensor], Tensor]:
        """One training step, counted from 1: one update of the weights, without waiting for the device.

        Returns:
            The metrics, () each; 1 where the step was finite and moved the weights, else 0, ().
        """
        settings, total = self.run.config.diffusion, torch.zeros((), device=self.run.device)
        with log.phase("model"):
            for number, batch in enumerate(batches):
                with no_sync(self.model, last=number == len(batches) - 1):
                    x0, noise, t = self.frozen.draw(batch)
                    x_t = add_noise(x0, noise, t, self.schedule)
                    prediction = self.frozen.predict(self.model, x_t, t, batch.text)
                    losses = diffusion_loss(prediction, x0, noise, t, settings.prediction, self.schedule,
                                            weighting=settings.weighting, min_snr_gamma=settings.min_snr_gamma,
                                            variance=settings.variance)  # fmt: skip
                    loss = losses.mean() / len(batches)
                    torch.autograd.backward(loss * self.state.loss_scale)
                total += loss.detach()
        with log.phase("optimizer"):
            norm = self.state.gradient_norm()
            step_is_finite = norm.isfinite().float()
            self.state.update(step, norm, step_is_finite)
        return {"loss": total, "norm": norm}, step_is_finite

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Unweighted loss on held-out pictures with fixed noise and timesteps, by band; EMA and raw; and samples."""
        self.inner.eval()
        values = {f"validation_loss_raw{name}": value for name, value in self._held_out_loss().items()}
        with self.state.ema.swapped([tensor.detach() for tensor in self.state.local.values()]):
            values |= {f"validation_loss{name}": value for name, value in self._held_out_loss().items()}
            network: Network = WholeModel(self.inner) if wants_fsdp(self.run.accelerator) else self.inner.unet
            images = sample_preview(self.run, self.prompts, network, self.text_encoder, self._encode, self.frozen.vae,
                                    self.latent_shape)  # fmt: skip
        self.inner.train()
        if self.run.is_main:
            path = self.folder / "samples" / f"step-{step:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            images.save(path)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if "band" not in name)
        self.run.report(f"{self.name} {step}: {shown}; pictures in {self.folder / 'samples'}")
        return values

    def finish(self) -> tuple[UNet, TextEncoder]:
        """The averaged models, on the CPU; all processes must call it."""
        average = self.state.named("ema")
        frozen = {name: gather_full(p) for name, p in self.inner.named_parameters() if name not in average}  # a pooler
        state = {name: tensor.detach().cpu() for name, tensor in {**frozen, **average}.items()}
        with torch.device("meta"):
            unet = UNet(self.inner.unet.config)
        unet.load_state_dict(_below("unet.", state), assign=True)
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        encoder = self.text_encoder
        if self.inner.text_encoder is not None:
            model = type(encoder.model)(encoder.model.config)
            model.load_state_dict(_below("text_encoder.model.", state))
            encoder = TextEncoder(model, encoder.tokenizer, encoder.max_length,
                                  use_attention_mask=encoder.use_attention_mask)  # fmt: skip
        return unet.eval(), encoder.cpu().eval()

    def _train_state(self) -> TrainState:
        section, rate = self.section, self.section.learning_rate
        trained = {name: p for name, p in self.inner.named_parameters() if p.requires_grad}
        text = {name: p for name, p in trained.items() if name.startswith("text_encoder.")}
        unet = {name: p for name, p in trained.items() if name not in text}
        groups = [(unet, rate)] + ([(text, section.text_learning_rate or rate)] if text else [])
        return TrainState(groups, section, fp16=self.run.precision == "fp16")

    def _batches(
        self, source: Source, plan: BatchPlan, caches: Caches, caption_dropout: float, flip: bool
    ) -> LatentBatches:
        config, (latents, text) = self.run.config, caches
        data = config.data.model_copy(update={"flip": flip})
        return LatentBatches(source, data, plan, config.seed, self.latent_shape, latents=latents,
                             text=text or self.text_encoder, num_timesteps=config.diffusion.num_timesteps,
                             caption_dropout=caption_dropout)  # fmt: skip

    def _encode(self, texts: list[str]) -> Tensor:
        """Text features (B, L, D); of a trained encoder by a call of the whole model, which FSDP asks for."""
        tokens, mask, _ = self.text_encoder.tokenize(texts)
        given = Tokens(tokens.to(self.run.device), mask.to(self.run.device))
        trained = self.inner.text_encoder is not None
        return (self.inner(None, None, given) if trained else self.text_encoder.encode(*given)).float()

    def _held_out_loss(self) -> dict[str, float]:
        """Mean loss over all bands of timesteps, and each band's; the processes share the batches."""
        accelerator, prediction = self.run.accelerator, self.run.config.diffusion.prediction
        sums = torch.zeros(self.validation.num_bands, 2, device=self.run.device, dtype=torch.float64)
        for start in range(0, len(self.validation), accelerator.num_processes):
            number = min(start + accelerator.process_index, len(self.validation) - 1)
            batch = self.validation[number]
            x0, noise, t = self.frozen.draw(batch)
            output = self.frozen.predict(self.inner, add_noise(x0, noise, t, self.schedule), t, batch.text)
            losses = diffusion_loss(output, x0, noise, t, prediction, self.schedule).double()
            if number == start + accelerator.process_index:  # the others only call the model: under FSDP all must
                sums[self.validation.band(number)] += torch.stack([losses.sum(), losses.new_tensor(len(losses))])
        sums = accelerator.reduce(sums, "sum")
        means = (sums[:, 0] / sums[:, 1]).tolist()
        total = (sums[:, 0].sum() / sums[:, 1].sum()).item()
        return {"": total} | {f"_band_{band}": value for band, value in enumerate(means)}


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of one part of a model, named as in it alone."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def first_captions(source: Source, count: int) -> tuple[str, ...]:
    """The first caption of pictures spread over the source."""
    places = [round(place * (len(source) - 1) / max(1, count - 1)) for place in range(min(count, len(source)))]
    return tuple((source.captions(index) or [""])[0] for index in places)
