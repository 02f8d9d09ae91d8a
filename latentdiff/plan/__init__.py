"""What a run will need: parameters, FLOPs, memory, disk and time, stage by stage.

Parameters and FLOPs are counted on the real models and losses (counting.py); everything else is labeled an estimate.
No image is opened and no weight is allocated.
"""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from unet.experts import ExpertContext

from ..config import Config
from ..data.batches import check_halves
from ..data.cache import encode_batch_size
from ..data.encodings import MAX_ERROR_PICTURES
from ..data.order import BatchPlan
from ..data.pictures import to_pixels
from ..device import DTYPES
from ..diffusion.process import add_noise, diffusion_loss, network_output
from ..errors import LatentDiffError, check_choice
from ..sampling.loop import CachedNetwork
from ..sections import TrainSection
from ..training.discriminator import Discriminator
from ..training.ema import TRACKED
from ..training.history import predict_after_chain
from ..training.network import FrozenParts, LatentModel
from ..training.perceptual import PerceptualLoss
from ..training.vae import Autoencoder, AutoencoderLosses
from ..training.vae_finish import MAX_STATISTICS_IMAGES
from ..training.vae_losses import StructuralLoss
from .budget import count_pictures, spend, steps_without_discriminator
from .counting import Autocast, Counter
from .devices import DEVICES, GIB, USABLE, Device, measure_cpu
from .models import Models, build_models
from .report import Memory, Plan, Stage, gib

__all__ = ["DEVICES", "Plan", "plan"]

Work = Callable[[Autocast, int], object]  # passes over a batch of pictures
ASSUMED_PICTURES = 1000  # if nobody says how many there are
MAX_BATCH = 4096  # pictures per pass; larger ones gain nothing
META = torch.device("meta")
# Model FLOPs utilization, a share of the peak. Published runs reach 0.24 (MosaicML, SD2 at 32x32 latents, A100) to 0.31
# (NVIDIA, MLPerf 4.0, H200). On two CPU cores, emoji-64 reached 0.5 to 0.7 of a large matmul (see docs/emoji-64.md).
MFU = {"gpu": 0.25, "cpu": 0.5}


def plan(
    config: Config, *, device: str = "cpu", num_devices: int = 1, dataset_size: int | None = None,
    mfu: float | None = None,
) -> Plan:  # fmt: skip
    """Plan every stage of a run.

    Args:
        config: of the run.
        device: `cpu` or one of `DEVICES`.
        num_devices: with one process each.
        dataset_size: number of training pictures; None plans for 1,000 or, with a budget, counts those of a folder.
        mfu: model FLOPs utilization, the share of the device's peak that training reaches; None means `MFU`.

    Raises:
        LatentDiffError: the device is unknown, the devices cannot share the batch evenly, or the pictures of a folder
            cannot be counted.
    """
    check_choice("device", device, ["cpu", *DEVICES])
    if num_devices < 1 or (dataset_size is not None and dataset_size < 1) or not 0 < (1.0 if mfu is None else mfu) <= 1:
        raise LatentDiffError(f"num_devices={num_devices}, dataset_size={dataset_size}, mfu={mfu!r}: "
                              "expected positive counts, and mfu above 0 and at most 1")  # fmt: skip
    chosen = DEVICES[device] if device != "cpu" else measure_cpu(num_devices)
    mfu = MFU["cpu" if device == "cpu" else "gpu"] if mfu is None else mfu
    planner = _Planner(config, chosen, num_devices, mfu, build_models(config))
    number = dataset_size or (count_pictures(config) if config.budget else None)
    notes = list(planner.models.notes)
    if config.budget and not number:
        notes.append(f"the number of training pictures is assumed to be {ASSUMED_PICTURES:,}; --pictures sets it")
    if config.budget:
        notes.append("training decides on its steps by the speed that it measures. This estimate leaves out start-up "
                     "and reading pictures, and for a small model on a GPU it is an upper limit")  # fmt: skip
    if config.precision == "auto" and not chosen.has_bf16 and device != "cpu":
        notes.append(f"{device} has no bf16, so precision=auto computes in float32; precision=fp16 is faster")
    if num_devices > 1:
        notes.append("every device holds all weights (DDP); FSDP shards those of latent training")
    return planner.plan(number or ASSUMED_PICTURES, notes)


@dataclass(frozen=True)
class _Planner:
    """Plans the stages of one run."""

    config: Config
    device: Device
    num_devices: int
    mfu: float
    models: Models

    def plan(self, number: int, notes: Sequence[str]) -> Plan:
        """Plan a run on a number of training pictures."""
        config = self.config
        vae = None if config.vae.pretrained else self.train_vae()
        encode = self.encode(number) if config.train_latent.cache else None
        latent, sample = self.train_latent(), self.sample()
        finishing, kept = self.finishing(number) if vae else (0.0, 0.0)
        encoding = encode.seconds - kept if encode else 0.0
        if config.budget:
            vae, latent = spend(config, vae, latent, sample, set_size=number, finishing=finishing, encoding=encoding)
        seconds = (vae.seconds if vae else 0.0) + finishing + encoding + latent.seconds
        stages = tuple(stage for stage in (vae, encode, latent, sample) if stage)
        return Plan(self.device, self.num_devices, self.mfu, stages, tuple(notes),
                    latent.purchase.end if latent.purchase else seconds)  # fmt: skip

    @property
    def precision(self) -> str:
        precision = self.config.precision
        return precision if precision != "auto" else "bf16" if self.device.has_bf16 else "fp32"

    def train_vae(self) -> Stage:
        section, models, one = self.config.train_vae, self.models, torch.ones((), device=META)
        with META:
            inner = Autoencoder(copy.deepcopy(models.vae), section.learn_variance).train()
            discriminator = Discriminator(section.discriminator_width, section.discriminator_layers)
            perceptual = PerceptualLoss() if section.perceptual_weights else StructuralLoss()
        inner.vae.enable_gradient_checkpointing(section.gradient_checkpointing)
        losses = AutoencoderLosses(inner, inner, discriminator, discriminator, perceptual, section, nullcontext,
                                   lambda gradients: gradients)  # fmt: skip

        def step(autocast: Autocast, batch: int, use_discriminator: bool) -> None:
            pixels = to_pixels(models.images(batch))
            loss, _, reconstruction = losses.autoencoder(
                pixels, models.noise(batch), one, use_discriminator=use_discriminator
            )
            autocast.backward(loss)
            if use_discriminator:
                autocast.backward(losses.discriminate(pixels, reconstruction))

        adversarial = section.adversarial_weight > 0
        vae_steps = steps_without_discriminator(section, section.steps, has_budget=False)
        modules = [inner, perceptual, discriminator] if adversarial else [inner, perceptual]
        parameters = {"vae": count(inner), "discriminator": adversarial * count(discriminator),
                      "lpips": count(perceptual)}  # fmt: skip
        stage = self._training("train_vae", section, modules, parameters,
                               lambda *_: inner.vae(to_pixels(models.images(1))),
                               lambda autocast, batch: step(autocast, batch, vae_steps < section.steps))  # fmt: skip
        shorter = self._run(lambda autocast, batch: step(autocast, batch, False), 1).flops
        total = section.batch_size * (vae_steps * shorter + (section.steps - vae_steps) * stage.step_flops)
        return replace(stage, total_flops=total, seconds=self._seconds(total, self.precision), early_flops=shorter)

    def train_latent(self) -> Stage:
        section, models, trains_text = self.config.train_latent, self.models, self.config.text_encoder.train
        models.text_encoder.set_trainable(trains_text)
        models.unet.enable_gradient_checkpointing(section.gradient_checkpointing)
        models.vae.requires_grad_(False)
        inner = LatentModel(models.unet, models.text_encoder if trains_text else None).train()
        frozen = FrozenParts(models.vae, None if trains_text else models.text_encoder, META, nullcontext)
        schedule, prediction = self.config.diffusion.build().to(META), network_output(self.config.diffusion.prediction)

        def loss(batch: int, cached: bool, chained: bool = False) -> Tensor:
            micro_batch = models.latent_batch(batch, cached=cached, caches_text=cached and not trains_text,
                                              chained=chained)  # fmt: skip
            (x0, noise, t), text, predict = frozen.prepare(micro_batch), frozen.text(micro_batch), frozen.predict
            x_t, chain = add_noise(x0, noise, t, schedule), micro_batch.chain
            output = (predict_after_chain(partial(predict, inner), x_t, t, chain, text, schedule) if chain
                      else predict(inner, x_t, t, text))  # fmt: skip
            return diffusion_loss(output, x0, noise, t, prediction, schedule).mean()

        parts = {"unet": models.unet, "text encoder": models.text_encoder, "vae": models.vae}
        parameters = {name: count(part) for name, part in parts.items()}
        number = section.ema_snapshots  # each of two averages
        stage = self._training("train_latent", section, list(parts.values()), parameters,
                               lambda _, batch: loss(batch, True),
                               lambda autocast, batch: autocast.backward(loss(batch, section.cache, True)),
                               len({section.ema_sigma_rel, *(TRACKED.values() if number else ())}))  # fmt: skip
        check_halves(models.unet.config.trajectory_attention, stage.batch)
        kept = {f"{number} snapshots of averages": number * 8 * stage.trained} if number else {}
        return replace(stage, disk=stage.disk | kept)

    def encode(self, number: int) -> Stage:
        """Plan encoding, in float32 without autocast: the cache does not depend on the training precision."""
        models, caches_text = self.models, not self.config.text_encoder.train
        flips, batch = 1 + self.config.data.flip, encode_batch_size(models.image_size)

        def work(autocast: Autocast, batch: int) -> None:
            with torch.no_grad():
                for _ in range(flips):
                    models.vae.latent_posterior(to_pixels(models.images(batch)))
                if caches_text:
                    models.text_encoder.encode(*models.tokens(batch))

        run = self._run(work, batch, "fp32")
        features = caches_text * models.text_encoder.max_length * models.text_encoder.context_dim
        values = flips * 2 * math.prod(models.latent_shape) + features
        disk = {"cache, with one caption per picture" if caches_text else "cache": number * (2 * values + 1)}
        parameters = {"vae": count(models.vae), "text encoder": count(models.text_encoder)}
        name = f"encode {number:,} pictures{', plain and mirrored' if flips == 2 else ''}"
        return self._untrained(name, parameters, 4 * sum(parameters.values()), run, batch, number, "fp32", disk)

    def finishing(self, number: int) -> tuple[float, float]:
        """Return the seconds to finish a VAE, and how many of them the cache is spared, as it keeps the encodings."""
        vae, stride = self.models.vae, math.ceil(number / MAX_STATISTICS_IMAGES)
        kept = stride == 1 and self.config.train_latent.cache
        encoded = math.ceil(number / stride)
        decoded = math.ceil(encoded / math.ceil(encoded / MAX_ERROR_PICTURES))
        with torch.no_grad():
            encode = self._run(lambda *_: vae.latent_posterior(to_pixels(self.models.images(1))), 1, "fp32").flops
            decode = self._run(lambda *_: vae.decode(self.models.noise(1)), 1, "fp32").flops
        encoding = encoded * encode * (1 + (kept and self.config.data.flip))
        return self._seconds(encoding + decoded * decode, "fp32"), kept * self._seconds(encoding, "fp32")

    def sample(self) -> Stage:
        """Plan sampling one picture with `LatentPipeline`; identical UNet passes are counted from a single one."""
        settings, models = self.config.validation, self.models.cast(DTYPES[self.precision])
        guided = settings.guidance_scale != 1
        with Counter() as run, Autocast(DTYPES[self.precision], norms_in_float32=False), torch.no_grad():
            context = models.text_encoder.encode(*models.tokens(2 if guided else 1))
            network = CachedNetwork(models.unet, context, range(settings.num_steps), along_trajectory=True)
            if isinstance(network.context, ExpertContext):
                network.context.projected(0)  # which an expert does when it is its turn
            for _ in range(1 + models.unet.config.trajectory_attention):  # a full history takes the most memory
                before = run.flops
                network(models.noise(1), 0)
            run.flops += (run.flops - before) * (settings.num_steps - 1)
            models.vae.decode(models.noise(1).to(context.dtype))
        parts = {"unet": models.unet, "text encoder": models.text_encoder, "vae": models.vae}
        parameters = {name: count(part) for name, part in parts.items()}
        name = f"sample one picture ({settings.num_steps} steps{', guided' if guided else ''})"
        stage = self._untrained(name, parameters, sum(map(num_bytes, parts.values())), run, 1, 1, self.precision,
                                {"finished model": 4 * sum(parameters.values())})  # fmt: skip
        return replace(stage, seconds=self._seconds(run.flops, self.precision, 1))

    def _untrained(
        self, name: str, parameters: dict[str, int], weights: int, run: Counter, batch: int, pictures: int,
        precision: str, disk: dict[str, int],
    ) -> Stage:  # fmt: skip
        flops, memory = run.flops // batch, Memory(weights, activations=run.peak)
        return Stage(name, parameters, 0, batch, flops, flops, pictures, flops * pictures, precision, memory,
                     self._fits(memory.total), batch, self._seconds(flops * pictures, precision), disk)  # fmt: skip

    def _training(
        self, name: str, section: TrainSection, modules: Sequence[nn.Module], parameters: dict[str, int], forward: Work,
        step: Work, averages: int = 1,
    ) -> Stage:  # fmt: skip
        try:
            share = BatchPlan(section.batch_size, 0, self.num_devices, section.micro_batch_size)
        except LatentDiffError as error:
            raise LatentDiffError(f"{name}.{error}") from None
        batch = share.pictures_per_pass
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)  # allocated from the second micro-batch on, under DDP always
        first, second = self._run(step, batch), self._run(step, 2 * batch)
        number = sum(p.numel() for p in trained)
        memory = Memory(sum(map(num_bytes, modules)), 4 * number, 8 * number + 4 * len(trained),
                        4 * number * averages, first.peak)  # fmt: skip
        slope = (second.peak - first.peak) / batch
        available = USABLE * self.device.memory * GIB - memory.states
        most = min(MAX_BATCH, (available - first.peak) / slope + batch) if available > memory.update else 0
        largest = 2 ** int(math.log2(most)) if most >= 1 else 0
        flops = first.flops // batch
        pictures, kept = section.steps * section.batch_size, section.keep_checkpoints
        checkpoint = 4 * number * (3 + averages)
        disk = {f"{kept} checkpoints and one being written": (kept + 1) * checkpoint}
        forward_flops = self._run(forward, 1, "fp32").flops
        stage = Stage(name, parameters, number, batch, forward_flops, flops, pictures, pictures * flops,
                      self.precision, memory, self._fits(memory.total), largest,
                      self._seconds(pictures * flops, self.precision), disk,
                      checkpoint=checkpoint, early_flops=flops)  # fmt: skip
        return replace(stage, advice=self._advice(stage, section, share))

    def _advice(self, stage: Stage, section: TrainSection, share: BatchPlan) -> tuple[str, ...]:
        total, advice = share.pictures_per_pass * share.accumulation_steps, []
        fitting = max((n for n in range(1, min(total, stage.largest_batch) + 1) if total % n == 0), default=0)
        if not stage.fits:
            if not section.gradient_checkpointing:
                advice.append(f"{stage.name}.gradient_checkpointing=true stores fewer activations")
            if 0 < fitting < stage.batch:
                advice.append(f"{stage.name}.micro_batch_size={fitting} fits, at the same batch_size")
            if not fitting and self.num_devices > 1 and stage.name == "train_latent":
                sharded = stage.memory.states // self.num_devices + stage.memory.activations
                advice.append(f"with FSDP over the {self.num_devices} devices: {gib(sharded)} on each (estimate)")
            elif not fitting and not advice:
                advice.append("not even one picture per pass fits: choose a smaller model or a device with more memory")
        elif fitting >= 2 * stage.batch:
            advice.append(f"there is room for {stage.name}.micro_batch_size={fitting}: fewer, larger passes")
        return tuple(advice)

    def _run(self, work: Work, batch: int, precision: str | None = None) -> Counter:
        autocast = Autocast(DTYPES[precision or self.precision], norms_in_float32=self.device.name != "cpu")
        with Counter() as counter, autocast:
            work(autocast, batch)
        return counter

    def _fits(self, size: int) -> bool:
        return size <= USABLE * self.device.memory * GIB

    def _seconds(self, flops: int, precision: str, devices: int | None = None) -> float:
        peak = self.device.single if precision == "fp32" else self.device.half
        return flops / (peak * 1e12 * self.mfu * (devices or self.num_devices))


def count(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in module.parameters())


def num_bytes(module: nn.Module) -> int:
    """Return the size of the parameters in bytes."""
    return sum(p.nbytes for p in module.parameters())
