"""Final step of VAE training: normalize the latents to mean 0 and std 1, and write a report."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vae import VAE
from vae.normalize import LatentStatistics, fold_statistics

from ..data.cache import encode_batch_size
from ..data.order import random_stream
from ..data.sources import Source
from .launch import Launch
from .vae import VAETraining, load_pixels

MAX_STATISTICS_IMAGES = 50_000  # for latent statistics; more would change only the fourth digit
MAX_ERROR_IMAGES = 1_000  # for the decoder's scale
LIKELIHOODS = {"l1": "laplace", "l2": "normal"}
NUM_CHECKED = 4  # images decoded in half precision


def finish_vae(task: VAETraining, run: Launch, folder: Path) -> dict[str, Any]:
    """Fold the latent statistics into the averaged VAE, then save it with a report, which is returned."""
    vae, log_variance = task.finish()
    before = latent_statistics(vae, task.train_source, run)
    fold_statistics(vae, before.mean.cpu(), before.std.cpu())
    after = latent_statistics(vae, task.train_source, run)
    likelihood, log_scale = LIKELIHOODS[run.config.train_vae.reconstruction], decoder_log_scale(task, vae, run)
    held_out = load_pixels(task.held_out, range(min(NUM_CHECKED, len(task.held_out))), run.config.data).to(run.device)
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
        "decoder_log_variance_learnt": log_variance,  # of the training loss, perceptual term included
        "half_precision": half_precision_errors(vae, held_out),
    }
    if run.is_main:
        metadata = {"decoder_likelihood": likelihood, "decoder_log_scale": repr(log_scale)}
        vae.cpu().save_pretrained(folder, metadata)
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    run.report(
        f"{folder}: latents of {after.num_pictures} pictures have mean 0 and standard deviation 1 per channel "
        f"to within {max(float(after.mean.abs().max()), float((after.std - 1).abs().max())):.1e}; "
        f"skewness up to {float(after.skewness.abs().max()):.2f}, "
        f"excess kurtosis up to {float(after.excess_kurtosis.abs().max()):.2f} (0: Gaussian); "
        f"decoding: {', '.join(_describe(name, value) for name, value in report['half_precision'].items())}"
    )
    run.accelerator.wait_for_everyone()
    return report


@torch.inference_mode()
def latent_statistics(vae: VAE, source: Source, run: Launch) -> LatentStatistics:
    """Compute statistics of the VAE's unscaled latents over the images, which are split across processes."""
    accelerator = run.accelerator
    stride = max(1, math.ceil(len(source) / MAX_STATISTICS_IMAGES))
    chosen = range(0, len(source), stride)
    statistics = LatentStatistics(vae.config.latent_channels, run.device)
    count = encode_batch_size(run.config.data.image_size)
    for number, start in enumerate(range(0, len(chosen), count)):
        if number % accelerator.num_processes == accelerator.process_index:
            pixels = load_pixels(source, chosen[start : start + count], run.config.data)
            if len(pixels):
                statistics.add(vae.posterior(pixels.to(run.device)))
    return LatentStatistics.from_state(accelerator.reduce(statistics.state(), "sum"))


@torch.inference_mode()
def decoder_log_scale(task: VAETraining, vae: VAE, run: Launch) -> float:
    """Return the log-scale of p(pixels | z) that maximizes the likelihood of training images, with sampled z.

    For a Laplace distribution the scale is the mean absolute error, for a normal one the mean squared error.
    """
    accelerator, kind = run.accelerator, run.config.train_vae.reconstruction
    stride = max(1, math.ceil(len(task.train_source) / MAX_ERROR_IMAGES))
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    for index in range(stride * accelerator.process_index, len(task.train_source), stride * accelerator.num_processes):
        pixels = load_pixels(task.train_source, range(index, index + 1), run.config.data).to(run.device)
        if len(pixels):
            noise = random_stream(run.config.seed, "validation", 0, index).standard_normal(
                task.latent_shape, dtype=np.float32
            )
            error = pixels - vae(pixels, torch.from_numpy(noise)[None].to(run.device))[0]
            error = error.abs() if kind == "l1" else error.square()
            sums += torch.stack([error.double().mean(), sums.new_ones(())])
    total, count = accelerator.reduce(sums, "sum").tolist()
    return math.log(total / count)


@torch.inference_mode()
def half_precision_errors(vae: VAE, pixels: torch.Tensor) -> dict[str, float | None]:
    """Return the largest error of decoding in bf16 and fp16, in units of 1/255, or None if it is not finite."""
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
    return f"not finite in {name}" if value is None else f"off by at most {value:.1f}/255 in {name}"
