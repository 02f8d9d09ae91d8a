"""Latent training: the UNet, and the text encoder with it or frozen, on forward-noised latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from text_encoder import TextEncoder
from unet import UNet
from vae import VAE

from ..data.batches import LatentBatch, LatentBatches, ValidationBatches, micro_batches
from ..data.cache import LatentCache, TextCache, to_pixels, weights_digest
from ..data.order import BatchPlan
from ..data.shards import digest
from ..data.sources import Source
from ..diffusion.process import add_noise, diffusion_loss
from .launch import Launch
from .logging import Record
from .loop import run_facts
from .optimizer import Updater, whole
from .parallel import no_sync, sharded
from .samples import draw_prompts


class LatentModel(nn.Module):
    """What is trained, as one module, so that DDP and FSDP see one."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder | None) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder  # None: frozen, its features come with the batch

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor | None, tokens: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Prediction at x, both (B, c, h, w), and t (B,), for features (B, L, D) or tokens (B, L) with their mask."""
        if context is None:
            context = cast(TextEncoder, self.text_encoder).encode(cast(Tensor, tokens), cast(Tensor, mask))
        return self.unet(x, t, context)


class LatentTraining:
    """The task: `learn`, `validate`, and what a checkpoint holds. See `loop.Task`."""

    name = "train_latent"

    def __init__(
        self,
        run: Launch,
        folder: Path,
        sources: tuple[Source, Source],
        vae: VAE,
        unet: UNet,
        text_encoder: TextEncoder,
        caches: tuple[tuple[LatentCache | None, TextCache | None], tuple[LatentCache | None, TextCache | None]],
    ) -> None:
        config, section = run.config, run.config.train_latent
        self.run, self.folder, self.section = run, folder, section
        self.num_pictures = len(sources[0])
        self.schedule = config.diffusion.build()
        self.device_schedule = self.schedule.to(run.device)
        self.vae = vae.to(run.device).requires_grad_(False).eval()
        self.text_encoder = text_encoder.to(run.device)
        trains_text = config.text_encoder.train
        self.text_encoder.set_trainable(trains_text)
        if section.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self.inner = LatentModel(unet, text_encoder if trains_text else None).train()
        self.model = sharded(self.inner, run, section)
        self.updaters: Mapping[str, Updater] = {"model": self._updater()}
        size = config.data.image_size // vae.config.downsampling
        self.latent_shape = (vae.config.latent_channels, size, size)
        self.plan = BatchPlan(section.batch_size, run.accelerator.process_index, run.accelerator.num_processes,
                              section.micro_batch_size)  # fmt: skip
        self.rows = self._batches(sources[0], self.plan, caches[0], config.diffusion.caption_dropout, config.data.flip)
        measured = BatchPlan(config.validation.batch_size)
        held_out = self._batches(sources[1], measured, caches[1], 0.0, False)
        self.validation = ValidationBatches(held_out, config.validation.num_pictures, config.validation.timestep_bands)
        self.prompts = config.validation.prompts or first_captions(sources[1], 16)
        pictures = caches[0][0].shards.facts["pictures"] if caches[0][0] else len(sources[0])
        vocabulary = digest(text_encoder.tokenizer.get_vocab())
        frozen = {"vae_weights": weights_digest(vae), "pictures": pictures, "vocabulary": vocabulary}
        if not trains_text:
            frozen["text_weights"] = weights_digest(text_encoder.model)
        self.facts = run_facts(run, "vae", "text_encoder", "unet", "diffusion", "train_latent") | frozen

    def batches(self, start: int, stop: int) -> Iterator[list[LatentBatch]]:
        """The micro-batches of steps start ... stop - 1."""
        pin = self.run.device.type == "cuda"
        return micro_batches(self.rows, self.plan, start, stop, self.run.config.workers, pin)

    def learn(self, batches: list[LatentBatch], step: int, record: Record) -> tuple[dict[str, Tensor], Tensor]:
        """One step: the loss of every micro-batch, its gradient, one update."""
        (updater,) = self.updaters.values()
        total = torch.zeros((), device=self.run.device)
        with record.phase("model"):
            for number, batch in enumerate(batches):
                with no_sync(self.model, last=number == len(batches) - 1):
                    loss = self._loss(batch, self.model).mean() / len(batches)
                    torch.autograd.backward(loss * updater.loss_scale)
                total += loss.detach()
        with record.phase("optimizer"):
            norm = updater.gradient_norm()
            moves = norm.isfinite().float()
            updater.update(step, norm, moves)
        return {"loss": total, "norm": norm}, moves

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Unweighted loss on held-out pictures with fixed noise and timesteps, by band; EMA and raw; and samples."""
        (updater,) = self.updaters.values()
        self.inner.eval()
        values = {f"validation_loss_raw{name}": value for name, value in self._bands().items()}
        with updater.ema.swapped([tensor.detach() for tensor in updater.local.values()]):
            values |= {f"validation_loss{name}": value for name, value in self._bands().items()}
            images = draw_prompts(self.run, self.prompts, self.inner, self.text_encoder, self.vae, self.schedule,
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
        (updater,) = self.updaters.values()
        average = updater.named("ema")
        frozen = {name: whole(p) for name, p in self.inner.named_parameters() if name not in average}  # BERT's pooler
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

    def _updater(self) -> Updater:
        section, rate = self.section, self.section.learning_rate
        trained = {name: p for name, p in self.inner.named_parameters() if p.requires_grad}
        text = {name: p for name, p in trained.items() if name.startswith("text_encoder.")}
        unet = {name: p for name, p in trained.items() if name not in text}
        groups = [(unet, rate)] + ([(text, section.text_learning_rate or rate)] if text else [])
        return Updater(groups, section, fp16=self.run.precision == "fp16")

    def _batches(
        self,
        source: Source,
        plan: BatchPlan,
        caches: tuple[LatentCache | None, TextCache | None],
        caption_dropout: float,
        flip: bool,
    ) -> LatentBatches:
        config = self.run.config
        latents, text = caches
        return LatentBatches(
            source,
            config.data.model_copy(update={"flip": flip}),
            plan,
            config.seed,
            self.latent_shape,
            num_timesteps=config.diffusion.num_timesteps,
            caption_dropout=caption_dropout,
            latents=latents,
            text=text or self.text_encoder,
        )

    def _loss(self, batch: LatentBatch, model: nn.Module, *, weighted: bool = True) -> Tensor:
        """Loss of each picture, (B,)."""
        settings, device = self.run.config.diffusion, self.run.device
        t, noise = (part.to(device, non_blocking=True) for part in (batch.t, batch.noise))
        x0 = self._clean_latents(batch)
        x = add_noise(x0, noise, t, self.device_schedule)
        context, tokens, mask = (None if part is None else part.to(device, non_blocking=True)
                                 for part in (batch.context, batch.tokens, batch.context_mask))  # fmt: skip
        with self.run.autocast():
            if context is None and self.inner.text_encoder is None:
                with torch.no_grad():
                    context = self.text_encoder.encode(cast(Tensor, tokens), cast(Tensor, mask))
            output = model(x, t, None if context is None else context.float(), tokens, mask)
        return diffusion_loss(
            output,
            x0,
            noise,
            t,
            settings.prediction,
            self.device_schedule,
            weighting=settings.weighting if weighted else "simple",
            min_snr_gamma=settings.min_snr_gamma,
            variance=settings.variance,
        )

    def _clean_latents(self, batch: LatentBatch) -> Tensor:
        device = self.run.device
        if batch.x0 is not None:
            return batch.x0.to(device, non_blocking=True)
        images, noise = cast(Tensor, batch.images), cast(Tensor, batch.posterior_noise)
        with torch.no_grad(), self.run.autocast():
            posterior = self.vae.latent_posterior(to_pixels(images.to(device, non_blocking=True)))
        return posterior.shifted(noise.to(device, non_blocking=True)).float()

    def _bands(self) -> dict[str, float]:
        """Mean loss over all bands, and each band's; the processes share the batches."""
        accelerator, bands = self.run.accelerator, self.validation.num_bands
        sums = torch.zeros(bands, 2, device=self.run.device, dtype=torch.float64)
        for start in range(0, len(self.validation), accelerator.num_processes):
            number = min(start + accelerator.process_index, len(self.validation) - 1)
            losses = self._loss(self.validation[number], self.inner, weighted=False).double()
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
