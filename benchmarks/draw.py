"""Sampling: LatentPipeline against diffusers' StableDiffusionPipeline, with the same weights, noise and steps.

    python benchmarks/draw.py --model emoji-256 --batch 1 --steps 25
    python benchmarks/draw.py --config emoji-256 --batch 8 --steps 10

A model, by default random weights in the shapes of a recipe, is opened by each side in a separate process, in
alternation: ours, diffusers as documented, and diffusers tuned (channels-last, fused q, k, v). The pictures are
compared; the peak is the memory that one call takes beyond what was held before it (VmHWM, or on CUDA what PyTorch
allocated).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latentdiff import LatentPipeline
from latentdiff.config import load_config
from text_encoder import TextEncoder, train_tokenizer
from unet import UNet
from vae import VAE

CAPTIONS = ["a red apple", "a blue car on the road", "an emoji of a smiling face", "a green tree in the rain"]


def build(recipe: str, folder: Path) -> None:
    """Save a model with random weights, none of them zero, in the layout that both sides open."""
    torch.manual_seed(0)
    config = load_config(recipe)
    tokenizer = train_tokenizer(CAPTIONS * 4, vocab_size=config.text_encoder.vocab_size,
                                max_length=config.text_encoder.max_length)  # fmt: skip
    encoder = TextEncoder.new(config.text_encoder.build(), tokenizer)
    vae = VAE(config.vae.build(config.data.image_size))
    side = config.data.image_size // vae.config.downsampling
    unet = UNet(config.unet.build(vae.config.latent_channels, encoder.context_dim, side))
    for parameter in unet.parameters():
        if not parameter.any():  # a new UNet predicts zero
            torch.nn.init.normal_(parameter, std=0.02)
    LatentPipeline(vae=vae, unet=unet, text_encoder=encoder, schedule=config.diffusion.build()).save_pretrained(folder)


def open_side(side: str, folder: Path, dtype: torch.dtype, device: str) -> Any:
    """Return a function from prompts, noise and number of steps to uint8 pictures (B, H, W, 3)."""
    if side == "ours":
        pipe = LatentPipeline.from_pretrained(folder, device=device, dtype=dtype)
        return lambda prompts, noise, steps: np.stack([
            np.asarray(image)
            for image in pipe(prompts, sampler="ddim", num_steps=steps, latents=noise, progress=False)
        ])  # fmt: skip
    import diffusers

    stock = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    stock.set_progress_bar_config(disable=True)
    if side == "tuned":
        for part in (stock.unet, stock.vae):
            part.to(memory_format=torch.channels_last)
            part.fuse_qkv_projections()
    return lambda prompts, noise, steps: np.stack([
        np.asarray(image)
        for image in stock(prompts, num_inference_steps=steps, guidance_scale=5.0,
                           latents=noise.to(device, dtype)).images
    ])  # fmt: skip


def status(key: str) -> float:
    """Return VmHWM or VmRSS of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def one_side(options: argparse.Namespace) -> None:
    """Run in a separate process: time one call, and output its seconds, its peak memory and its pictures."""
    torch.set_num_threads(options.threads)
    sample = open_side(options.side, options.folder, getattr(torch, options.dtype), options.device)
    shape = tuple(int(n) for n in (options.folder / "shape.txt").read_text().split())
    noise = torch.randn(options.batch, *shape, generator=torch.Generator().manual_seed(1))
    prompts = [CAPTIONS[index % len(CAPTIONS)] for index in range(options.batch)]
    for _ in range(options.warm_up):  # whatever is created once
        sample(prompts, noise, 2)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = status("VmRSS")
    started = time.perf_counter()
    pictures = sample(prompts, noise, options.steps)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else status("VmHWM")
    print(f"{seconds:.3f} {peak - before:.0f}")
    np.save(options.folder / f"{options.side}.npy", pictures)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", default="emoji-256", help="recipe whose shapes the random weights have")
    parser.add_argument("--model", help="folder or name of a model that is drawn with, instead of random weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warm-up", type=int, default=1, help="calls of two steps before the one that is timed")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        one_side(options)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.model:
            LatentPipeline.from_pretrained(options.model, device="cpu", dtype=torch.float32).save_pretrained(folder)
        else:
            build(options.config, folder)
        pipe = LatentPipeline.from_pretrained(folder, device="cpu", dtype=torch.float32)
        side = pipe.image_size // pipe.vae.config.downsampling
        (folder / "shape.txt").write_text(f"{pipe.unet.config.in_channels} {side} {side}")
        found: dict[str, list[tuple[float, float]]] = {"ours": [], "diffusers": [], "tuned": []}
        for _ in range(options.rounds):
            for name, results in found.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--side", name, "--folder", str(folder)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                seconds, peak = output.split()[-2:]
                results.append((float(seconds), float(peak)))
        difference = np.abs(np.load(folder / "ours.npy").astype(int) - np.load(folder / "diffusers.npy"))
    print(f"{options.model or options.config}, batch {options.batch}, {options.steps} steps of ddim, guidance 5, "
          f"{options.dtype}, {options.device}, {options.threads} threads; {(difference <= 1).mean():.4%} of the values "
          "within 1/255 of diffusers'")  # fmt: skip
    for name, results in found.items():
        print(f"{name:>10}: {statistics.median(seconds for seconds, _ in results):8.2f} s, peak "
              f"{statistics.median(peak for _, peak in results):7.0f} MiB beyond the model")  # fmt: skip
    for peer in ("diffusers", "tuned"):
        ratio = [theirs[0] / ours[0] for ours, theirs in zip(found["ours"], found[peer], strict=True)]
        print(f"{peer} / ours: {statistics.median(ratio):.2f} ({min(ratio):.2f} – {max(ratio):.2f})")
    return 0 if options.dtype != "float32" or (difference <= 1).mean() >= 0.999 else 1


if __name__ == "__main__":
    sys.exit(main())
