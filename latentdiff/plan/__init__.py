"""What a run will need before it begins: parameters, FLOPs, memory, disk and time, stage by stage.

Parameters and FLOPs are counted on the real models (latentdiff/plan_flops.py); all else is an estimate and called one.
No picture is looked at, no weight is allocated.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from .. import plan_flops as passes
from ..config import Config
from ..data.cache import pictures_at_a_time
from ..data.order import BatchPlan
from ..errors import LatentDiffError, check_choice
from ..sections import TrainSection
from ..training.discriminator import Discriminator
from ..training.latent import LatentModel
from ..training.perceptual import PerceptualLoss
from ..training.structural import StructuralLoss
from ..training.vae import Autoencoder
from .devices import DEVICES, GIB, USABLE, Device, measured_cpu
from .flops import Autocast, Counter, Models, size_of

Work = Callable[[Autocast, int], object]  # passes over some pictures
LARGEST = 4096  # pictures a pass; more is of no use
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the device's peak. Peers reached 0.24 (MosaicML, SD2 at 32x32 latents, A100) to 0.31 (NVIDIA, MLPerf 4.0, H200). On
# two CPU cores emoji-64 reached 0.5 to 0.7 of a large matrix product (the pictures a second of docs/emoji-64.md).
MFU = {"gpu": 0.25, "cpu": 0.5}


@dataclass(frozen=True)
class Memory:
    """Bytes on each device; all but the activations are exact."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    average: int = 0
    activations: int = 0  # and half-precision copies and temporary tensors: the most at once

    @property
    def total(self) -> int:
        """The estimated peak: in the passes, or after them, when the average's update takes one more copy."""
        return sum((self.weights, self.gradients, self.optimizer, self.average, max(self.activations, self.average)))


@dataclass(frozen=True)
class Stage:
    """One stage. FLOPs are those of a picture; a multiply-add is two."""

    name: str
    parameters: dict[str, int]
    trained: int  # parameters
    batch: int  # pictures a pass and device
    forward_flops: int
    step_flops: int  # forward and backward, with what is recomputed; of a stage that does not train: all
    pictures: int  # in the whole stage
    total_flops: int
    precision: str
    memory: Memory
    fits: bool
    largest_batch: int  # power of two that is estimated to fit; 0: none
    seconds: float  # estimated
    disk: dict[str, int]  # bytes by what they are for
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All stages on some devices."""

    device: Device
    num_devices: int
    mfu: float
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every stage is estimated to fit."""
        return all(stage.fits for stage in self.stages)

    def lines(self) -> list[str]:
        """The plan as text."""
        device = self.device
        origin = "measured with matrix products" if device.name == "cpu" else "the vendor's figures without sparsity"
        speed = f"{device.half:.3g} TFLOP/s in half precision, {device.single:.3g} in float32 ({origin})"
        head = [
            f"{self.num_devices} x {device.name}: {device.memory:.1f} GiB each, {speed}",
            "parameters and FLOPs are counted; memory and times (of passes only) are estimates;",
            f"the device is assumed to reach {self.mfu:.0%} of its peak (--mfu); a single small picture waits longer",
        ]
        end = f"estimate: the run {'fits' if self.fits else 'does not fit'} on {self.num_devices} x {device.name}"
        return [*head, *(line for stage in self.stages for line in ["", *_stage_lines(stage)]),
                "", *(f"note: {note}" for note in self.notes), end]  # fmt: skip


def plan(
    config: Config, *, device: str = "cpu", num_devices: int = 1, dataset_size: int | None = None,
    mfu: float | None = None,
) -> Plan:  # fmt: skip
    """Plan a run.

    Args:
        config: of the run.
        device: `cpu`, or one of `DEVICES`.
        num_devices: processes, one a device.
        dataset_size: pictures to train on; None: the cache is planned for 1,000.
        mfu: share of the device's peak that training is assumed to reach; None: `MFU`.

    Raises:
        LatentDiffError: no such device, or a batch that the devices cannot share.
    """
    check_choice("device", device, ["cpu", *DEVICES])
    if num_devices < 1 or (dataset_size is not None and dataset_size < 1) or not 0 < (1.0 if mfu is None else mfu) <= 1:
        raise LatentDiffError(f"num_devices={num_devices}, dataset_size={dataset_size}, mfu={mfu!r}: "
                              "expected counts from 1 up and a share above 0, up to 1")  # fmt: skip
    chosen = DEVICES[device] if device != "cpu" else measured_cpu(num_devices)
    mfu = MFU["cpu" if device == "cpu" else "gpu"] if mfu is None else mfu
    planner = _Planner(config, chosen, num_devices, mfu, passes.build_models(config))
    notes = list(planner.models.notes)
    if config.precision == "auto" and not chosen.has_bf16 and device != "cpu":
        notes.append(f"{device} has no bf16, so precision=auto computes in float32; precision=fp16 is faster")
    if num_devices > 1:
        notes.append("several devices each hold all weights (DDP); FSDP shares out those of the latent training")
    vae = [] if config.vae.pretrained else [planner.train_vae()]
    encode = [planner.encode(dataset_size)] if config.train_latent.cache else []
    return Plan(chosen, num_devices, mfu, (*vae, *encode, planner.train_latent(), planner.sample()), tuple(notes))


@dataclass(frozen=True)
class _Planner:
    """What the stages' plans share."""

    config: Config
    device: Device
    num_devices: int
    mfu: float
    models: Models

    @property
    def precision(self) -> str:
        wanted = self.config.precision
        return wanted if wanted != "auto" else "bf16" if self.device.has_bf16 else "fp32"

    def train_vae(self) -> Stage:
        section, size = self.config.train_vae, self.models.image_size
        with torch.device("meta"):
            inner = Autoencoder(copy.deepcopy(self.models.vae), section.learn_variance).train()
            critic = Discriminator(section.discriminator_width, section.discriminator_layers)
            perceptual = PerceptualLoss() if section.perceptual_weights else StructuralLoss()
        inner.vae.enable_gradient_checkpointing(section.gradient_checkpointing)
        plays = section.adversarial_weight > 0
        alone = max(0, min(section.steps, section.adversarial_start - 1)) if plays else section.steps

        def step(autocast: Autocast, batch: int, playing: bool = alone < section.steps) -> None:
            passes.vae_step(inner, critic if playing else None, perceptual, autocast, batch, size)

        modules = [inner, perceptual, critic] if plays else [inner, perceptual]
        parameters = {"vae": count(inner), "discriminator": plays * count(critic), "lpips": count(perceptual)}
        pixels = torch.empty(1, 3, size, size, device="meta")
        stage = self._training("train_vae", section, modules, parameters, lambda *_: inner.vae(pixels), step)
        shorter = self._run(lambda autocast, batch: step(autocast, batch, playing=False), 1).flops
        total = section.batch_size * (alone * shorter + (section.steps - alone) * stage.step_flops)
        return replace(stage, total_flops=total, seconds=self._seconds(total, self.precision))

    def train_latent(self) -> Stage:
        section, models, trains_text = self.config.train_latent, self.models, self.config.text_encoder.train
        models.text_encoder.set_trainable(trains_text)
        models.unet.enable_gradient_checkpointing(section.gradient_checkpointing)
        models.vae.requires_grad_(False)
        inner = LatentModel(models.unet, models.text_encoder if trains_text else None).train()

        def loss(batch: int, cached: bool = True) -> torch.Tensor:
            return passes.latent_loss(models, inner, batch, cached=cached)

        parameters = {"unet": count(models.unet), "text encoder": count(models.text_encoder), "vae": count(models.vae)}
        modules = [models.unet, models.text_encoder, models.vae]
        return self._training("train_latent", section, modules, parameters, lambda _, batch: loss(batch),
                              lambda autocast, batch: autocast.backward(loss(batch, section.cache)))  # fmt: skip

    def encode(self, dataset_size: int | None) -> Stage:
        """Float32, without autocast: the cache's contents do not depend on the precision of the training."""
        models, caches_text = self.models, not self.config.text_encoder.train
        flips, batch = 1 + self.config.data.flip, pictures_at_a_time(models.image_size)

        def work(autocast: Autocast, batch: int) -> None:
            with torch.no_grad():
                for _ in range(flips):
                    models.vae.latent_posterior(torch.empty(batch, 3, *2 * [models.image_size], device="meta"))
                if caches_text:
                    models.text_encoder.encode(*models.tokens(batch))

        run = self._run(work, batch, "fp32")
        features = caches_text * models.text_encoder.max_length * models.text_encoder.context_dim
        number, flops = dataset_size or 1000, run.flops // batch
        values = flips * 2 * math.prod(models.latent_shape) + features
        disk = {"cache, with one caption a picture" if caches_text else "cache": number * (2 * values + 1)}
        parameters = {"vae": count(models.vae), "text encoder": count(models.text_encoder)}
        memory = Memory(4 * sum(parameters.values()), activations=run.peak)
        name = f"encode {number:,} pictures{', upright and mirrored' if flips == 2 else ''}"
        return Stage(name, parameters, 0, batch, flops, flops, number, flops * number, "fp32", memory,
                     self._fits(memory.total), batch, self._seconds(flops * number, "fp32"), disk)  # fmt: skip

    def sample(self) -> Stage:
        settings, models = self.config.validation, self.models.cast(DTYPES[self.precision])
        guided = settings.guidance_scale != 1
        with Counter() as counter, Autocast(DTYPES[self.precision], norms_in_float32=False), torch.no_grad():
            passes.sample_step(models, counter, settings.num_steps, guided=guided)
        parts = {"unet": models.unet, "text encoder": models.text_encoder, "vae": models.vae}
        parameters = {name: count(part) for name, part in parts.items()}
        memory = Memory(sum(map(size_of, parts.values())), activations=counter.peak)
        name = f"sample one picture ({settings.num_steps} steps{', guided' if guided else ''})"
        return Stage(name, parameters, 0, 1, counter.flops, counter.flops, 1, counter.flops, self.precision, memory,
                     self._fits(memory.total), 1, self._seconds(counter.flops, self.precision, 1),
                     {"finished model": 4 * sum(parameters.values())})  # fmt: skip

    def _training(
        self, name: str, section: TrainSection, modules: Sequence[nn.Module], parameters: dict[str, int], forward: Work,
        step: Work,
    ) -> Stage:  # fmt: skip
        try:
            share = BatchPlan(section.batch_size, 0, self.num_devices, section.micro_batch_size)
        except LatentDiffError as error:
            raise LatentDiffError(f"{name}.{error}") from None
        batch = share.pictures_a_pass
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)  # there from the second micro-batch on, under DDP always
        first, second = self._run(step, batch), self._run(step, 2 * batch)
        number = sum(p.numel() for p in trained)
        memory = Memory(sum(map(size_of, modules)), 4 * number, 8 * number + 4 * len(trained), 4 * number, first.peak)
        slope = (second.peak - first.peak) / batch
        room = USABLE * self.device.memory * GIB - (memory.total - max(memory.activations, memory.average))
        most = min(LARGEST, (room - first.peak) / slope + batch) if room > memory.average else 0
        largest = 2 ** int(math.log2(most)) if most >= 1 else 0
        flops = first.flops // batch
        pictures, kept = section.steps * section.batch_size, section.keep_checkpoints
        disk = {f"{kept} checkpoints, and one being written": (kept + 1) * 16 * number}  # weights, average, two moments
        alone = self._run(forward, 1, "fp32").flops
        stage = Stage(name, parameters, number, batch, alone, flops, pictures, pictures * flops, self.precision, memory,
                      self._fits(memory.total), largest, self._seconds(pictures * flops, self.precision),
                      disk)  # fmt: skip
        return replace(stage, advice=self._advice(stage, section, share))

    def _advice(self, stage: Stage, section: TrainSection, share: BatchPlan) -> tuple[str, ...]:
        whole, advice = share.pictures_a_pass * share.passes, []
        fitting = max((n for n in range(1, min(whole, stage.largest_batch) + 1) if whole % n == 0), default=0)
        if not stage.fits:
            if not section.gradient_checkpointing:
                advice.append(f"{stage.name}.gradient_checkpointing=true keeps fewer activations")
            if 0 < fitting < stage.batch:
                advice.append(f"{stage.name}.micro_batch_size={fitting} fits, with the same batch_size")
            if not fitting and self.num_devices > 1 and stage.name == "train_latent":
                states = stage.memory.total - stage.memory.activations
                shared = states // self.num_devices + stage.memory.activations
                advice.append(f"with FSDP over the {self.num_devices} devices: {_gib(shared)} on each (estimate)")
            elif not fitting and not advice:
                advice.append("not even one picture a pass fits: choose a smaller model or a device with more memory")
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
    """Parameters."""
    return sum(p.numel() for p in module.parameters())


def _stage_lines(stage: Stage) -> list[str]:
    memory, each = stage.memory, ", ".join(f"{name} {number:,}" for name, number in stage.parameters.items() if number)
    rows = [("parameters", each + (f"; {stage.trained:,} are trained" if stage.trained else ""))]
    flops = f"{stage.forward_flops / 1e9:,.1f} GFLOP forward"
    if stage.trained:
        flops += f", {stage.step_flops / 1e9:,.1f} forward and backward ({stage.step_flops / stage.forward_flops:.2f}x)"
    rows.append(("one picture", f"{flops}, in {stage.precision}"))
    parts = {"weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer,
             "average": memory.average, "activations": memory.activations}  # fmt: skip
    inside = " + ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)
    rows.append(("memory", f"estimate {_gib(memory.total)} a device with {stage.batch} a pass: {inside}"))
    verdict = "fits (estimate)" if stage.fits else "DOES NOT FIT (estimate)"
    if stage.trained:
        verdict += f"; the largest power of two a pass that fits: {stage.largest_batch or 'none'}"
    rows.append(("verdict", verdict))
    rows += [("disk", f"{what}: {_gib(size)}") for what, size in stage.disk.items()]
    rows.append(("time", f"estimate {_duration(stage.seconds)} for {stage.total_flops / 1e12:,.3g} TFLOP"))
    rows += [("advice", text) for text in stage.advice]
    return [stage.name, *(f"  {what:<12}{text}" for what, text in rows)]


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.2g} seconds"
