"""Final step of VAE training: normalize the latents to mean 0 and std 1, and write a report.

The pictures are read and encoded once; what the encoder made of them serves both statistics and the training cache.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from vae import VAE, DiagonalGaussian
from vae.normalize import LatentStatistics, fold_statistics

from ..data.cache import record_digest
from ..data.encodings import Encodings
from ..data.sources import Source
from ..device import without_tf32
from .launch import Launch
from .vae import VAETraining, load_pixels

MAX_STATISTICS_IMAGES = 50_000  # for latent statistics; more would change only the fourth digit
LIKELIHOODS = {"l1": "laplace", "l2": "normal"}
NUM_CHECKED = 4  # images decoded in half precision


def finish_vae(task: VAETraining, run: Launch, folder: Path) -> dict[str, Any]:
    """Fold the latent statistics into the averaged VAE, then save it with a report, which is returned."""
    vae, log_variance = task.finish()
    encodings = open_encodings(vae, task.source, run)
    encodings.build(run.accelerator, "encoding train pictures")
    if run.is_main and encodings.stride == 1:
        record_digest(encodings.source, run.folder / "cache" / "train-pictures.json", encodings.summaries())
    before = latent_statistics(vae, encodings, run)
    fold_statistics(vae, before.mean.cpu(), before.std.cpu())
    after = latent_statistics(vae, encodings, run)
    # The scale that maximizes the likelihood of training pictures: the mean absolute error of a Laplace distribution,
    # the mean squared error of a normal one, of pictures decoded from a sampled z.
    likelihood, log_scale = LIKELIHOODS[run.config.train_vae.reconstruction], math.log(encodings.decoder_error())
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
        vae.facts = {"decoder_likelihood": likelihood, "decoder_log_scale": repr(log_scale)}
        vae.cpu().save_pretrained(folder)
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


def open_encodings(vae: VAE, source: Source, run: Launch) -> Encodings:
    """Return the encodings of the training pictures, to be built or, where they are complete, to be read."""
    config = run.config
    stride = max(1, math.ceil(len(source) / MAX_STATISTICS_IMAGES))
    flips = stride == 1 and config.train_latent.cache and config.data.flip  # only the cache needs them
    return Encodings(run.folder / "cache" / "train-encodings", source, vae, config.data, flips=flips, stride=stride,
                     seed=config.seed, loss=config.train_vae.reconstruction, workers=config.workers)  # fmt: skip


def kept_encodings(vae: VAE, source: Source, run: Launch) -> Encodings | None:
    """Return the encodings of all training pictures if finishing this VAE has left them, after a check, else None."""
    encodings = open_encodings(vae, source, run)
    if encodings.stride > 1 or not encodings.shards.is_complete():
        return None
    encodings.build(run.accelerator)
    return encodings


def finish_seconds(task: VAETraining, run: Launch) -> float:
    """Estimate how long `finish_vae` will take, from one batch of pictures; every process measures for itself."""
    encodings = open_encodings(task.inner.vae, task.source, run)
    num_shards = encodings.shards.num_shards
    return encodings.seconds() * math.ceil(num_shards / run.accelerator.num_processes) / num_shards


@torch.inference_mode()
def latent_statistics(vae: VAE, encodings: Encodings, run: Launch) -> LatentStatistics:
    """Compute statistics of the VAE's unscaled latents over the pictures, which are split across processes."""
    accelerator = run.accelerator
    statistics = LatentStatistics(vae.config.latent_channels, run.device)
    batches = encodings.batches[accelerator.process_index :: accelerator.num_processes]
    for outputs, good in encodings.encoded(batches):
        posterior = vae.posterior_from(outputs[0])
        if not good.all():
            readable = good.bool()
            posterior = DiagonalGaussian(posterior.mean[readable], posterior.logvar[readable])
        if good.any():
            statistics.add(posterior)
    return LatentStatistics.from_state(accelerator.reduce(statistics.state(), "sum"))


@torch.inference_mode()
@without_tf32()
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
