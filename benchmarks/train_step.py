"""One latent training step, ours and that of diffusers' text-to-image example: same UNet, pictures and dtype.

    python benchmarks/train_step.py [--config emoji-64] [--precision bf16] [--steps 20]

The peer is the loop of diffusers' examples/text_to_image/train_text_to_image.py, written out with its classes: decode
and transform the pictures, AutoencoderKL, BERT, DDPMScheduler, UNet2DConditionModel, min-SNR weights, AdamW,
clip_grad_norm_. Like that script, it encodes in every step. EMA is optional there (`--use_ema`) and always on here, so
the peer is measured with and without it.
Ours is `LatentTraining.train_step` including its batches, with and without caches. The text encoder is always frozen.
Before anything is timed, one loss and its gradient are compared. Rounds alternate; the ratio is that of medians.
"""

from __future__ import annotations

import argparse
import gc
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel, compute_snr
from transformers import BertModel

from latentdiff.config import Config, load_config
from latentdiff.data.batches import CachedBatch
from latentdiff.data.cache import read_pixels
from latentdiff.data.pictures import to_pixels
from latentdiff.data.sources import open_source
from latentdiff.diffusion.process import add_noise, diffusion_loss
from latentdiff.files.scheduler import scheduler_config
from latentdiff.training.latent import LatentTraining
from latentdiff.training.launch import Launch, launch
from latentdiff.training.logging import MetricLogger
from latentdiff.training.stages import make_caches, new_unet, open_text_encoder, open_vae
from text_encoder import TextEncoder, train_tokenizer
from vae import VAE

Step = Callable[[], float]
OURS = {"latentdiff, cached": True, "latentdiff, encoding in the step": False}
PEERS = {"diffusers' example": False, "diffusers' example, --use_ema": True}


def prepare(arguments: argparse.Namespace, folder: Path) -> tuple[Config, Launch]:
    """Save a VAE and a BERT with random weights; returns a config that names them, and its launch."""
    torch.manual_seed(0)
    config = load_config(arguments.config)
    VAE(config.vae.build(config.data.image_size)).save_pretrained(folder / "vae")
    captions = [caption for several in open_source(config.data)[0].all_captions() for caption in several]
    section = config.text_encoder
    tokenizer = train_tokenizer(captions, vocab_size=section.vocab_size, max_length=section.max_length)
    TextEncoder.new(section.build(), tokenizer).save_pretrained(folder / "text_encoder")
    overrides = [f"output={folder / 'run'}", f"vae.pretrained={folder / 'vae'}", "text_encoder.train=false",
                 f"text_encoder.pretrained={folder / 'text_encoder'}", f"precision={arguments.precision}",
                 "trackers=[]", "train_latent.warmup_steps=0", "train_latent.lr_schedule=constant"]  # fmt: skip
    config = load_config(arguments.config, overrides)
    return config, launch(config)


def our_task(config: Config, run: Launch, cached: bool) -> LatentTraining:
    """Return our training, with weights from seed 0; zero layers are randomized, so that all layers have gradients."""
    config = config.model_copy(update={"train_latent": config.train_latent.model_copy(update={"cache": cached})})
    run = replace(run, config=config)
    sources = open_source(config.data)
    vae, encoder = open_vae(run), open_text_encoder(run.config, sources[0])
    caches = make_caches(run, sources, vae, encoder)
    torch.manual_seed(0)
    unet = new_unet(config, vae, encoder)
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return LatentTraining(run, run.folder / "task", sources, vae, unet, encoder, caches)


def our_step(task: LatentTraining) -> Step:
    """Return a function that loads a batch and takes a step, as the training loop does."""
    batches = task.batches(0, 10**6)
    log = MetricLogger(task.run, task.run.folder, "benchmark", 0, 10**6, task.section.batch_size)
    number = iter(range(1, 10**6))

    def step() -> float:
        metrics, _ = task.train_step(next(batches), next(number), log)
        return float(metrics["loss"])

    return step


class Peer:
    """The training loop of diffusers' example."""

    def __init__(self, task: LatentTraining, folder: Path, use_ema: bool) -> None:
        self.run, self.config, self.source = task.run, task.run.config, task.data.source
        task.inner.unet.save_pretrained(folder / "unet")
        device = self.run.device
        self.vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae").to(device).requires_grad_(False)
        self.text_encoder = BertModel.from_pretrained(folder / "text_encoder").to(device).requires_grad_(False)
        self.tokenizer = task.text_encoder.tokenizer
        self.unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").to(device).train()
        settings = {name: value for name, value in scheduler_config(self.config.diffusion.process()).items()
                    if name not in ("_class_name", "set_alpha_to_one")}  # fmt: skip
        self.scheduler = diffusers.DDPMScheduler(**settings)
        section = task.section
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=section.learning_rate, betas=section.betas,
                                           weight_decay=section.weight_decay)  # fmt: skip
        self.ema = EMAModel(self.unet.parameters(), foreach=True) if use_ema else None
        self.batch_size, self.random = section.batch_size, np.random.default_rng(0)

    def pictures(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield pixels and tokens, loaded in the main process, as by the example's default without workers."""
        while True:
            order = self.random.permutation(len(self.source))
            for indices in order[: len(order) // self.batch_size * self.batch_size].reshape(-1, self.batch_size):
                images = np.stack([read_pixels(self.source, int(index), self.config.data) for index in indices])
                captions = [self.source.captions(int(index))[0] for index in indices]
                ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt",
                                     max_length=self.config.text_encoder.max_length)  # fmt: skip
                yield to_pixels(torch.from_numpy(images)).contiguous(), ids["input_ids"]

    def loss(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Return the example's loss for v prediction, with --snr_gamma if the recipe has min-SNR weights."""
        noisy = self.scheduler.add_noise(latents, noise, t)
        target = self.scheduler.get_velocity(latents, noise, t)
        prediction = self.unet(noisy, t, context, return_dict=False)[0]
        error = F.mse_loss(prediction.float(), target.float(), reduction="none")
        if self.config.diffusion.weighting == "simple":
            return error.mean()
        snr = compute_snr(self.scheduler, t)
        weights = torch.minimum(snr, torch.full_like(snr, self.config.diffusion.min_snr_gamma)) / (snr + 1)
        return (error.mean(dim=list(range(1, error.dim()))) * weights).mean()

    def steps(self) -> Step:
        """Return a function that takes one step of the example."""
        pictures = self.pictures()

        def step() -> float:
            pixels, tokens = (part.to(self.run.device) for part in next(pictures))
            with self.run.autocast():
                with torch.no_grad():
                    latents = self.vae.encode(pixels).latent_dist.sample() * self.vae.config.scaling_factor
                    context = self.text_encoder(tokens, return_dict=False)[0]
                noise = torch.randn_like(latents)
                t = torch.randint(self.scheduler.config.num_train_timesteps, (len(latents),), device=latents.device)
                loss = self.loss(latents, noise, t, context)
            average = loss.repeat(self.batch_size).mean()  # the example gathers this in every step
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.step(self.unet.parameters())
            return float(average)

        return step


def check_equal(task: LatentTraining, peer: Peer) -> None:
    """Compare one loss and the gradient of every weight, in float32, on the same batch."""
    batch = task.data[0]
    assert isinstance(batch, CachedBatch)
    assert isinstance(batch.text, torch.Tensor)
    frozen = replace(task.frozen, autocast=nullcontext)
    x0, noise, t = frozen.prepare(batch)
    output = frozen.predict(task.inner, add_noise(x0, noise, t, task.schedule), t, frozen.text(batch))
    settings = task.run.config.diffusion
    losses = diffusion_loss(output, x0, noise, t, settings.prediction, task.schedule, weighting=settings.weighting)
    ours = losses.mean()
    theirs = peer.loss(x0, noise, t, batch.text.float().to(x0.device))
    torch.autograd.backward([ours, theirs])
    gradients = dict(task.inner.unet.named_parameters())
    worst = max(float((parameter.grad - gradients[name].grad).norm() / parameter.grad.norm())
                for name, parameter in peer.unet.named_parameters()
                if float(parameter.grad.norm()) > 1e-6)  # fmt: skip
    both = ours.item(), theirs.item()
    print(f"loss: ours {both[0]:.6f}, diffusers' {both[1]:.6f}; largest relative gradient error {worst:.1e}")
    assert abs(both[0] / both[1] - 1) < 1e-4
    assert worst < 1e-2
    task.inner.zero_grad()
    peer.unet.zero_grad()


def peak_memory(arguments: argparse.Namespace) -> int:
    """Return the peak memory in MiB of one contestant, in a separate process."""
    command = [sys.executable, __file__, "--config", arguments.config, "--precision", arguments.precision]
    return int(subprocess.run([*command, "--alone", arguments.alone], capture_output=True, text=True, check=True)
               .stdout.split()[-1])  # fmt: skip


def alone(arguments: argparse.Namespace) -> None:
    """Take three steps of one contestant, and print the peak memory: resident, or on a GPU what PyTorch allocated."""
    with tempfile.TemporaryDirectory() as name:
        config, run = prepare(arguments, Path(name))
        if arguments.alone in OURS:
            step = our_step(our_task(config, run, OURS[arguments.alone]))
        else:
            task = our_task(config, run, True)
            peer = Peer(task, Path(name), PEERS[arguments.alone])
            del task
            gc.collect()
            step = peer.steps()
        for _ in range(3):
            step()
    if run.device.type == "cuda":
        print(torch.cuda.max_memory_allocated() // 2**20)
        return
    status = Path("/proc/self/status").read_text()  # getrusage would return the parent's peak if that is larger
    print(int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) // 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="emoji-64")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--steps", type=int, default=10, help="steps of each contestant per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        return alone(arguments)
    with tempfile.TemporaryDirectory() as name:
        config, run = prepare(arguments, Path(name))
        tasks = {label: our_task(config, run, cached) for label, cached in OURS.items()}
        cached = tasks["latentdiff, cached"]
        check_equal(cached, Peer(cached, Path(name), False))
        steps = {label: our_step(task) for label, task in tasks.items()}
        steps |= {label: Peer(cached, Path(name), use_ema).steps() for label, use_ema in PEERS.items()}
        times: dict[str, list[float]] = {label: [] for label in steps}
        for number in range(arguments.rounds + 1):
            for label, step in steps.items():
                start = time.perf_counter()
                for _ in range(arguments.steps):
                    step()
                if run.device.type == "cuda":
                    torch.cuda.synchronize()
                if number:  # the first round warms up
                    times[label].append((time.perf_counter() - start) / arguments.steps)
    reference = median(times["diffusers' example"])
    print(f"{config.train_latent.batch_size} pictures of {config.data.image_size} px per step, {run.precision}, "
          f"{torch.get_num_threads()} threads, {run.device}")  # fmt: skip
    for label, seconds in times.items():
        arguments.alone = label
        ratios = [reference / at for at in (median(seconds), max(seconds), min(seconds))]
        print(f"{label:35s} {1 / median(seconds):6.2f} steps/s  {ratios[0]:5.2f}x "
              f"({ratios[1]:.2f} to {ratios[2]:.2f})  {peak_memory(arguments)} MiB")  # fmt: skip
    return None


if __name__ == "__main__":
    main()
