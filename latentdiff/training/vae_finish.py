"""The end of VAE training: latents of mean 0 and standard deviation 1, a look at their shape, half-precision checks."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vae import VAE
from vae.normalize import LatentStatistics, fold_statistics

from ..data.cache import pictures_at_a_time
from ..data.order import draws
from ..data.sources import Source
from .launch import Launch
from .vae import VAETraining, pixels_of

MOST_PICTURES = 50_000  # that the statistics are taken over; more would change the fourth digit
MOST_ERRORS = 1_000  # pictures that the decoder's scale is measured on
LIKELIHOODS = {"l1": "laplace", "l2": "normal"}
CHECKED = 4  # pictures decoded in half precision


def finish_vae(task: VAETraining, run: Launch, folder: Path) -> dict[str, Any]:
    """Fold the latents' statistics into the averaged VAE, write it with a report; returns the report."""
    vae, log_variance = task.finish()
    before = measure(vae, task.train_source, run)
    fold_statistics(vae, before.mean.cpu(), before.std.cpu())
    after = measure(vae, task.train_source, run)
    likelihood, log_scale = LIKELIHOODS[run.config.train_vae.reconstruction], decoder_log_scale(task, vae, run)
    held_out = pixels_of(task.held_out, range(min(CHECKED, len(task.held_out))), run.config.data).to(run.device)
    report: dict[str, Any] = {
        "pictures": after.num_pictures,
        "former_mean": before.mean.tolist(),
        "former_std": before.std.tolist(),
        "mean": after.mean.tolist(),
        "std": after.std.tolist(),
        "skewness": after.skewness.tolist(),
        "excess_kurtosis": after.excess_kurtosis.tolist(),
        "largest_correlation": float((after.correlation - torch.eye(after.channels).to(after.mean)).abs().max()),
        "kl_nats_per_picture": before.kl,
        "kl_bits_per_dimension": before.bits_per_dimension,
        "decoder_likelihood": likelihood,
        "decoder_log_scale": log_scale,
        "decoder_log_variance_learnt": log_variance,  # of the training's loss, with its perceptual term
        "half_precision": half_precision(vae, held_out),
    }
    if run.is_main:
        facts = {"decoder_likelihood": likelihood, "decoder_log_scale": repr(log_scale)}
        vae.cpu().save_pretrained(folder, facts)
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    run.report(
        f"{folder}: latents of {after.num_pictures} pictures have mean 0 and standard deviation 1 per channel to "
        f"{max(float(after.mean.abs().max()), float((after.std - 1).abs().max())):.1e}; "
        f"skewness up to {float(after.skewness.abs().max()):.2f}, "
        f"excess kurtosis up to {float(after.excess_kurtosis.abs().max()):.2f} (0: Gaussian); "
        f"decoding differs by {', '.join(_describe(name, value) for name, value in report['half_precision'].items())}"
    )
    run.accelerator.wait_for_everyone()
    return report


@torch.inference_mode()
def measure(vae: VAE, source: Source, run: Launch) -> LatentStatistics:
    """Statistics of the raw code over the pictures, which the processes share."""
    accelerator = run.accelerator
    stride = max(1, math.ceil(len(source) / MOST_PICTURES))
    chosen = range(0, len(source), stride)
    statistics = LatentStatistics(vae.config.latent_channels, run.device)
    count = pictures_at_a_time(run.config.data.image_size)
    for number, start in enumerate(range(0, len(chosen), count)):
        if number % accelerator.num_processes == accelerator.process_index:
            pixels = pixels_of(source, chosen[start : start + count], run.config.data)
            if len(pixels):
                statistics.add(vae.posterior(pixels.to(run.device)))
    return LatentStatistics.from_state(accelerator.reduce(statistics.state(), "sum"))


@torch.inference_mode()
def decoder_log_scale(task: VAETraining, vae: VAE, run: Launch) -> float:
    """log of the scale of p(pixels | z) that makes the training pictures most probable, through draws of z.

    A Laplace distribution's scale is the mean of |error|, a normal one's variance the mean of its square.
    """
    accelerator, kind = run.accelerator, run.config.train_vae.reconstruction
    stride = max(1, math.ceil(len(task.train_source) / MOST_ERRORS))
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    for index in range(stride * accelerator.process_index, len(task.train_source), stride * accelerator.num_processes):
        pixels = pixels_of(task.train_source, range(index, index + 1), run.config.data).to(run.device)
        if len(pixels):
            noise = draws(run.config.seed, "validation", 0, index).standard_normal(task.latent_shape, dtype=np.float32)
            error = pixels - vae(pixels, torch.from_numpy(noise)[None].to(run.device))[0]
            error = error.abs() if kind == "l1" else error.square()
            sums += torch.stack([error.double().mean(), sums.new_ones(())])
    total, count = accelerator.reduce(sums, "sum").tolist()
    return math.log(total / count)


@torch.inference_mode()
def half_precision(vae: VAE, pixels: torch.Tensor) -> dict[str, float | None]:
    """Largest difference that decoding in bf16 and fp16 makes, in units of 1/255; None where it is not finite."""
    if not len(pixels):
        return {}
    latents = vae.encode(pixels)
    reference = vae.decode(latents).clamp(-1, 1)
    differences: dict[str, float | None] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        half = VAE(vae.config).to(pixels.device).eval()
        half.load_state_dict(vae.state_dict())
        decoded = half.to(dtype).decode(latents.to(dtype)).float()
        finite = bool(decoded.isfinite().all())
        differences[name] = float((decoded.clamp(-1, 1) - reference).abs().max()) * 127.5 if finite else None
    return differences


def _describe(name: str, value: float | None) -> str:
    return f"infinity in {name}" if value is None else f"at most {value:.1f}/255 in {name}"
