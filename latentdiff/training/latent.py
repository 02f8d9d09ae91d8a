"""Latent training: the UNet, and the text encoder unless it is frozen, on noised latents."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from text_encoder import TextEncoder
from unet import Denoiser, Experts
from unet.experts import Calls, edges_of, new_denoiser
from vae import VAE

from ..data.batches import Chain, LatentBatch, LatentBatches, Tokens, ValidationBatches, micro_batches
from ..data.cache import LatentCache, TextCache, weights_digest
from ..data.order import BatchPlan
from ..data.shards import digest
from ..data.sources import Source
from ..diffusion.process import add_noise, diffusion_loss, network_output
from ..sampling.loop import Network
from ..sampling.settings import SamplingSettings
from .best import Best
from .budget import no_limit, seconds_of
from .ema import TRACKED
from .fidelity import Fidelity
from .fingerprint import fingerprint
from .graphs import GradientGraph, Parts
from .history import predict_after_chain
from .launch import Launch, wants_fsdp
from .logging import MetricLogger
from .network import FrozenParts, FullModelNetwork, LatentModel
from .optimizer import TrainState
from .parallel import evaluation_mode, gather_full, in_any_process, no_sync, sharded
from .preview import decoded_grid, sample_prompts
from .snapshots import Snapshots
from .spikes import Spikes
from .timetable import Timetable

Caches = tuple[LatentCache | None, TextCache | None]


class LatentTraining:
    """Latent training as a `loop.Training`."""

    name = "train_latent"

    def __init__(
        self,
        run: Launch,
        folder: Path,
        sources: tuple[Source, Source],
        vae: VAE,
        unet: Denoiser,
        text_encoder: TextEncoder,
        caches: tuple[Caches, Caches],
    ) -> None:
        config, section = run.config, run.config.train_latent
        self.run, self.folder, self.section = run, folder, section
        self.timetable = Timetable(section, self.name, has_budget=config.budget is not None)
        self.best, self.spikes = Best(run, folder), Spikes(run, section.max_spike)
        self.source = sources[0]
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
        self.snapshots = Snapshots(run, folder, section.ema_snapshots, self.timetable, self.state)
        self.graph = GradientGraph(run, section, self.states)
        size = config.data.image_size // vae.config.downsampling
        self.latent_shape = (vae.config.latent_channels, size, size)
        self.plan = run.batch_plan(section)
        self.data = self._batches(sources[0], self.plan, caches[0], config.diffusion.caption_dropout, config.data.flip,
                                  unet.config.trajectory_attention)  # fmt: skip
        self.chain_parts = len(Chain._fields) if self.data.history else 0
        plan, validation = BatchPlan(config.validation.batch_size), config.validation
        self.captioned, self.uncaptioned = (
            ValidationBatches(self._batches(sources[1], plan, caches[1], dropout, False), validation.num_pictures,
                              validation.timestep_bands)
            for dropout in (0.0, 1.0)
        )  # fmt: skip
        self.prompts = config.validation.prompts or first_captions(sources[1], 16)
        self.fidelity = Fidelity(run, sources[0], caches[0][0]) if section.evaluate_every else None
        self.fingerprint = fingerprint(run, "vae", "text_encoder", "unet", "diffusion", "train_latent") | {
            "recipe_steps": section.steps if config.budget is not None else None,
            "vae_weights": weights_digest(vae),
            "pictures": caches[0][0].shards.inputs["pictures"] if caches[0][0] else len(sources[0]),
            "vocabulary": digest(text_encoder.tokenizer.get_vocab()),
        }
        if not trains_text:
            self.fingerprint["text_weights"] = weights_digest(text_encoder.model)

    def batches(self, start: int, stop: int) -> Iterator[list[LatentBatch]]:
        """Yield the list of micro-batches of each step from `start` to `stop` - 1, counted from 0."""
        pin = self.run.device.type == "cuda"
        return micro_batches(self.data, self.plan, start, stop, self.run.config.workers, pin)

    def train_step(self, batches: list[LatentBatch], step: int, log: MetricLogger) -> tuple[dict[str, Tensor], Tensor]:
        """Take one training step, counted from 1, without waiting for the device.

        Returns scalar metrics, and a scalar that is 1 if the step was finite and updated the weights, else 0.
        """
        with log.phase("model"):
            parts = [(*self.frozen.prepare(batch), *self.frozen.chain(batch), *self.frozen.text(batch))
                     for batch in batches]  # fmt: skip
            calls = tuple(self._calls(batch) for batch in batches)
            total = self.graph(partial(self._gradients, calls), parts, calls)["loss"]
        with log.phase("optimizer"):
            norm = self.state.gradient_norm()
            step_is_finite = self.spikes.accept(step, total, norm.isfinite().float())
            self.state.update(step, norm, step_is_finite)
        return {"loss": total, "norm": norm}, step_is_finite

    def _gradients(self, calls: Sequence[Calls | None], parts: Parts) -> dict[str, Tensor]:
        """Leave the gradients of micro-batches (x0, noise, t, *chain, *text) in the weights; return their mean loss.

        The mean is over all pictures, whichever experts they fall to. As t is uniform over the batch, each expert gets
        in expectation its band's share of them, even where strata cross the edges, so its expected gradient needs no
        other weight. A mean over an expert's own pictures, times its share, would favor some timesteps of its band.
        """
        settings, total = self.run.config.diffusion, torch.zeros((), device=self.run.device)
        predicted, predict = network_output(settings.prediction), partial(self.frozen.predict, self.model)
        for number, ((x0, noise, t, *rest), called) in enumerate(zip(parts, calls, strict=True)):
            chain, text = rest[: self.chain_parts], rest[self.chain_parts :]
            x_t = add_noise(x0, noise, t, self.schedule)
            with no_sync(self.model, last=number == len(parts) - 1):
                prediction = (predict_after_chain(predict, x_t, t, Chain(*chain), text, self.schedule) if chain
                              else predict(x_t, t, text, called))  # fmt: skip
                losses = diffusion_loss(prediction, x0, noise, t, predicted, self.schedule,
                                        weighting=settings.weighting, min_snr_gamma=settings.min_snr_gamma,
                                        variance=settings.variance)  # fmt: skip
                loss = losses.mean() / len(parts)
                torch.autograd.backward(loss * self.state.loss_scale)
            total += loss.detach()
        return {"loss": total}

    def _calls(self, batch: LatentBatch) -> Calls | None:
        """Return which experts predict which rows; under FSDP, all processes call what one of them needs."""
        experts = self.inner.unet
        if not isinstance(experts, Experts):
            return None
        needed = set(experts.experts_at(batch.t))  # not yet on the device
        if wants_fsdp(self.run.accelerator):
            needed.update(in_any_process(self.run, needed, len(experts.unets)))
        return experts.calls(batch.t, needed)

    def validate(self, step: int, check_time: Callable[[], None]) -> dict[str, float]:
        """Compute the unweighted loss on held-out images per timestep band, with EMA and raw weights; save samples."""
        with evaluation_mode(self.inner):
            losses = self.held_out_loss(self.captioned, check_time)
            values = {f"validation_loss_raw{name}": value for name, value in losses.items()}
            with self.state.ema.swapped([tensor.detach() for tensor in self.state.local.values()]):
                losses = self.held_out_loss(self.captioned, check_time)
                values |= {f"validation_loss{name}": value for name, value in losses.items()}
                if self.section.keep_best:
                    values["validation_loss_unconditional"] = self.held_out_loss(self.uncaptioned, check_time)[""]
                settings, begin = self.run.config.validation.sampling(), self.run.clock.elapsed()
                images = self._preview(settings, check_time)
                if self.fidelity is not None and self.fidelity.is_due(step):
                    each = (self.run.clock.elapsed() - begin) / len(self.prompts)
                    values |= self.fidelity.measure(step, each, partial(self._sample, settings, check_time))
        if self.section.keep_best:
            self.best.offer(step, values["validation_loss_unconditional"], self.state)
        if self.run.is_main:
            path = self.folder / "samples" / f"step-{step:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            images.save(path)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if "band" not in name)
        self.run.report(f"{self.name} {step}: {shown}; samples in {self.folder / 'samples'}")
        return values

    def rehearse(self) -> float:
        """Estimate the seconds of `validate` from one batch and two steps of sampling."""
        settings = self.run.config.validation.sampling()
        few = settings.model_copy(update={"num_steps": min(2, settings.num_steps)})
        with evaluation_mode(self.inner):
            self.held_out_loss(self.captioned, rounds=1)  # the first pass prepares
            batch = seconds_of(lambda: self.held_out_loss(self.captioned, rounds=1))
            preview = seconds_of(lambda: self._preview(few))
        rounds = math.ceil(len(self.captioned) / self.run.accelerator.num_processes) * (2 + self.section.keep_best)
        pictures = len(self.prompts) * (1 if settings.guidance_scale == 1 else 2) * (settings.num_steps - few.num_steps)
        return batch * (rounds + pictures / min(self.captioned.batch_size, len(self.captioned.pictures))) + preview

    def finish(self, average: Mapping[str, Tensor] | None = None) -> tuple[Denoiser, TextEncoder]:
        """Return UNet and text encoder on the CPU with an EMA, by default the present one; all processes call it."""
        average = average or self.state.named("ema")
        frozen = {name: gather_full(p) for name, p in self.inner.named_parameters() if name not in average}  # pooler
        state = {name: tensor.detach().cpu() for name, tensor in {**frozen, **average}.items()}
        with torch.device("meta"):
            unet = new_denoiser(self.inner.unet.config, edges_of(self.inner.unet))
        unet.load_state_dict(submodule_state("unet.", state), assign=True)
        unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        encoder = self.text_encoder
        if self.inner.text_encoder is not None:
            model = type(encoder.model)(encoder.model.config)
            model.load_state_dict(submodule_state("text_encoder.model.", state))
            encoder = TextEncoder(model, encoder.tokenizer, encoder.max_length,
                                  use_attention_mask=encoder.use_attention_mask)  # fmt: skip
        return unet.eval(), encoder.cpu().eval()

    def _preview(self, settings: SamplingSettings, check_time: Callable[[], None] = no_limit) -> Image.Image:
        """Sample the validation prompts with the present weights."""
        return decoded_grid(self.run, self.frozen.vae, self._sample(settings, check_time, self.prompts), self.prompts)

    def _sample(
        self, settings: SamplingSettings, check_time: Callable[[], None], prompts: Sequence[str], first: int = 0
    ) -> Tensor:
        """Sample latents with the present weights."""
        network: Network = FullModelNetwork(self.inner) if wants_fsdp(self.run.accelerator) else self.inner.unet
        return sample_prompts(self.run, settings, prompts, network, self.text_encoder, self._encode,
                              self.latent_shape, check_time, first)  # fmt: skip

    def _train_state(self) -> TrainState:
        section, rate = self.section, self.section.learning_rate
        trained = {name: p for name, p in self.inner.named_parameters() if p.requires_grad}
        text = {name: p for name, p in trained.items() if name.startswith("text_encoder.")}
        unet = {name: p for name, p in trained.items() if name not in text}
        groups = [(unet, rate)] + ([(text, section.text_learning_rate or rate)] if text else [])
        return TrainState(groups, section, self.timetable, fp16=self.run.precision == "fp16",
                          tracked=TRACKED if section.ema_snapshots else None,
                          in_step=not isinstance(self.inner.unet, Experts))  # fmt: skip

    def _batches(
        self, source: Source, plan: BatchPlan, caches: Caches, caption_dropout: float, flip: bool, history: int = 0
    ) -> LatentBatches:
        config, (latents, text) = self.run.config, caches
        data = config.data.model_copy(update={"flip": flip})
        return LatentBatches(source, data, plan, config.seed, self.latent_shape, latents=latents,
                             text=text or self.text_encoder, num_timesteps=config.diffusion.num_timesteps,
                             caption_dropout=caption_dropout, history=history)  # fmt: skip

    def _encode(self, texts: list[str]) -> Tensor:
        """Text features (B, L, D); a trained encoder is called through the full model, as FSDP requires."""
        tokens, mask, _ = self.text_encoder.tokenize(texts)
        given = Tokens(tokens.to(self.run.device), mask.to(self.run.device))
        trained = self.inner.text_encoder is not None
        return (self.inner(None, None, given) if trained else self.text_encoder.encode(*given)).float()

    def held_out_loss(
        self, batches: ValidationBatches, check_time: Callable[[], None] = no_limit, rounds: int | None = None
    ) -> dict[str, float]:
        """Mean loss over all timesteps and per band; in each round every process takes one of the batches."""
        accelerator, prediction = self.run.accelerator, network_output(self.run.config.diffusion.prediction)
        sums = torch.zeros(batches.num_bands, 2, device=self.run.device, dtype=torch.float64)
        for start in range(0, len(batches), accelerator.num_processes)[:rounds]:
            check_time()
            number = min(start + accelerator.process_index, len(batches) - 1)
            batch = batches[number]
            x0, noise, t = self.frozen.prepare(batch)
            text = self.frozen.text(batch)
            calls = self._calls(batch)
            output = self.frozen.predict(self.inner, add_noise(x0, noise, t, self.schedule), t, text, calls)
            losses = diffusion_loss(output, x0, noise, t, prediction, self.schedule).double()
            if number == start + accelerator.process_index:  # the rest only call the model, as all must under FSDP
                sums[batches.band(number)] += torch.stack([losses.sum(), losses.new_tensor(len(losses))])
        sums = accelerator.reduce(sums, "sum")
        means = (sums[:, 0] / sums[:, 1]).tolist()
        total = (sums[:, 0].sum() / sums[:, 1].sum()).item()
        return {"": total} | {f"_band_{band}": value for band, value in enumerate(means)}


def submodule_state(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a module within the model, under its own names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def first_captions(source: Source, count: int) -> tuple[str, ...]:
    """Return the first captions of `count` images spread evenly over the source."""
    indices = [round(i * (len(source) - 1) / max(1, count - 1)) for i in range(min(count, len(source)))]
    return tuple((source.captions(index) or [""])[0] for index in indices)
