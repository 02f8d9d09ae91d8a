"""What a GPU does with this repository: training, drawing, attention. One command, at most five minutes on an H100.

    python benchmarks/gpu.py [--only unet,vae,draw,sd1,xformers] [--compiled] [--profile] [--output FOLDER]

Training steps are whole ones (forward, backward, clipping, AdamW, average) in bf16 autocast on random data on the GPU.
A share of the card is that of its bf16 matrix product (8192 x 8192 x 8192), measured first; operations are counted by
PyTorch on the meta device, a training step as three forward passes. Drawing is compared with diffusers on the same
weights and noise, as documented and tuned (channels-last, fused q, k, v; with --compiled also torch.compile in mode
reduce-overhead); how far the pictures differ is in the same line. Results go to gpu.json and gpu.md as they are made.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from draw import CAPTIONS, build
from torch.utils.flop_counter import FlopCounterMode

from latentdiff import LatentPipeline, norms
from latentdiff.config import load_config
from latentdiff.data.batches import Tokens
from latentdiff.diffusion.process import add_noise, diffusion_loss
from latentdiff.sampling.loop import CachedNetwork
from latentdiff.sections import TrainSection
from latentdiff.training.graphs import GradientGraph, Gradients, Parts
from latentdiff.training.network import LatentModel
from latentdiff.training.optimizer import TrainState
from latentdiff.training.vae import Autoencoder, AutoencoderLosses
from latentdiff.training.vae_losses import StructuralLoss
from text_encoder import TextEncoder, train_tokenizer
from unet import UNet
from vae import VAE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"


LAUNCH: Any = SimpleNamespace(device=torch.device(DEVICE), accelerator=SimpleNamespace(num_processes=1))


class Table:
    """Results, printed and written as they come."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows, self.start = folder, list[dict[str, Any]](), time.perf_counter()

    def add(self, what: str, **values: Any) -> None:
        """Add a line."""
        self.rows.append({"what": what, **values})
        words = ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in values.items())
        print(f"[{time.perf_counter() - self.start:6.1f} s] {what}: {words}", flush=True)
        (self.folder / "gpu.json").write_text(json.dumps(self.rows, indent=1) + "\n")
        lines = [f"| {row['what']} | " + ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value
                 in row.items() if name != "what") + " |" for row in self.rows]  # fmt: skip
        (self.folder / "gpu.md").write_text("\n".join(["| | |", "|---|---|", *lines]) + "\n")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def median_seconds(call: Callable[[], Any], number: int = 20, warm_up: int = 3) -> float:
    """Return the median time of a call, the work on the device included."""
    number, warm_up = (number, warm_up) if ON_GPU else (1, 0)
    for _ in range(warm_up):
        call()
    synchronize()
    seconds = []
    for _ in range(number):
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def ceiling() -> float:
    """Return the operations a second of a large matrix product in bf16, on random numbers."""
    size = 8192 if ON_GPU else 256
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_seconds(partial(torch.matmul, a, b))


def operations(model: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """Return the floating-point operations of a forward pass of one picture."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.to("meta")(*(each.to("meta") for each in inputs))
    return int(counter.get_total_flops())


def random_weights(model: torch.nn.Module) -> None:
    """Replace zeros, so that no gradient is zero."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)


def new_unet(recipe: str) -> tuple[UNet, TextEncoder]:
    """Return a UNet and its text encoder in a recipe's shapes."""
    config = load_config(recipe)
    section = config.text_encoder
    if section.pretrained:
        section = section.model_copy(update={"pretrained": None})
    tokenizer = train_tokenizer(CAPTIONS * 4, vocab_size=section.vocab_size, max_length=section.max_length)
    encoder = TextEncoder.new(section.build(), tokenizer)
    with torch.device(DEVICE):
        unet = UNet(config.unet.build(4, encoder.context_dim, 32))
        random_weights(unet)
    return unet, encoder.to(DEVICE)


def train_unet(table: Table, options: argparse.Namespace, peak: float, recipe: str, batches: Sequence[int]) -> None:
    """Time training steps of a recipe's UNet with its text encoder."""
    torch.manual_seed(0)
    config = load_config(recipe)
    unet, encoder = new_unet(recipe)
    length = config.text_encoder.max_length
    x, context = torch.randn(1, 4, 32, 32), torch.randn(1, length, encoder.context_dim)
    count = operations(UNet(unet.config), x, torch.zeros(1), context)
    encoder.set_trainable(config.text_encoder.train)
    model = LatentModel(unet, encoder if config.text_encoder.train else None).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = TrainState([(trained, 1e-4)], config.train_latent)
    schedule, step = config.diffusion.build().to(torch.device(DEVICE)), iter(range(1, 10**6))
    for mode in modes(options):
        for batch in batches if mode == "graph" else batches[-1:]:
            forward = torch.compile(model) if mode == "compiled" else model
            x0, noise = (torch.randn(batch, 4, 32, 32, device=DEVICE) for _ in range(2))
            t = torch.randint(0, 1000, (batch,), device=DEVICE)
            ids = torch.randint(5, 50, (batch, length), device=DEVICE)
            text: Any = (ids, torch.ones_like(ids, dtype=torch.bool))
            if model.text_encoder is None:
                text = (torch.randn(batch, length, encoder.context_dim, device=DEVICE),)

            def gradients(parts: Parts, forward: Any = forward) -> dict[str, torch.Tensor]:
                ((x0, noise, t, *text),) = parts
                with torch.autocast(DEVICE, torch.bfloat16):
                    prompt = Tokens(*text) if len(text) > 1 else text[0]
                    output = forward(add_noise(x0, noise, t, schedule), t, prompt)
                loss = diffusion_loss(output, x0, noise, t, "v", schedule).mean()
                loss.backward()
                return {"loss": loss.detach()}

            parts = [(x0, noise, t, *text)]
            train_step = whole_step(gradients, parts, config.train_latent, state, mode, step)
            name = f"training, UNet of {recipe}, batch {batch}, {mode}"
            report_training(table, name, train_step, batch, 3 * count, peak)
            if options.profile and mode == "eager":
                profile(train_step)


def train_vae(table: Table, options: argparse.Namespace, peak: float, batches: Sequence[int]) -> None:
    """Time training steps of emoji-256's VAE."""
    torch.manual_seed(0)
    config = load_config("emoji-256")
    size, shape = config.data.image_size, config.vae.build(config.data.image_size)
    vae = VAE(shape)
    count = operations(VAE(shape), torch.randn(1, 3, size, size))
    inner = Autoencoder(vae, config.train_vae.learn_variance).to(DEVICE).train()
    side = size // shape.downsampling
    for mode in modes(options):
        model = torch.compile(inner) if mode == "compiled" else inner
        state = TrainState([(dict(inner.named_parameters()), 1e-4)], config.train_vae)
        losses = AutoencoderLosses(inner, model, None, None, StructuralLoss().to(DEVICE), config.train_vae,
                                   partial(torch.autocast, DEVICE, torch.bfloat16), lambda values: values)  # fmt: skip
        step, scale = iter(range(1, 10**6)), torch.ones((), device=DEVICE)
        for batch in batches if mode == "graph" else batches[:1]:
            pixels = torch.rand(batch, 3, size, size, device=DEVICE) * 2 - 1
            noise = torch.randn(batch, shape.latent_channels, side, side, device=DEVICE)

            def gradients(parts: Parts, losses: Any = losses, scale: Any = scale) -> dict[str, torch.Tensor]:
                ((pixels, noise),) = parts
                loss, metrics, _ = losses.autoencoder(pixels, noise, scale, use_discriminator=False)
                loss.backward()
                return dict(metrics)

            train_step = whole_step(gradients, [(pixels, noise)], config.train_vae, state, mode, step)
            name = f"training, VAE of emoji-256, batch {batch}, {mode}"
            report_training(table, name, train_step, batch, 3 * count, peak)
            if options.profile and mode == "eager":
                profile(train_step)


def whole_step(
    gradients: Gradients, parts: Parts, section: TrainSection, state: TrainState, mode: str, step: Iterator[int]
) -> Callable[[], None]:
    """Return a training step on fixed inputs: gradients, clipping, AdamW and the average."""
    graph = GradientGraph(LAUNCH, section, {"model": state})
    graph.enabled = graph.enabled and mode == "graph"

    def take() -> None:
        graph(gradients, parts)
        norm = state.gradient_norm()
        state.update(next(step), norm, norm.isfinite().float())

    return take


def modes(options: argparse.Namespace) -> list[str]:
    """Return how to run training steps: kernel by kernel, as a CUDA graph, compiled."""
    return ["eager", *(["graph"] if ON_GPU else []), *(["compiled"] if options.compiled else [])]


def report_training(
    table: Table, name: str, step: Callable[[], None], batch: int, count: int, peak: float
) -> None:  # fmt: skip
    """Time a training step and add a line."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step()
    synchronize()
    first, seconds = time.perf_counter() - start, median_seconds(step, 12, 4)
    memory = torch.cuda.max_memory_allocated() / 2**30 if ON_GPU else 0.0
    table.add(name, ms=1e3 * seconds, pictures_a_second=batch / seconds, TFLOP_a_second=batch * count / seconds / 1e12,
              share_of_the_card=batch * count / seconds / peak, GiB=memory, seconds_of_the_first=first)  # fmt: skip


def profile(step: Callable[[], None]) -> None:
    """Print what a step is made of."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]) as found:
        step()
        synchronize()
    averages = found.key_averages()
    key = "self_cuda_time_total" if ON_GPU else "self_cpu_time_total"
    print(averages.table(sort_by=key, row_limit=45, max_name_column_width=90))


def draw(table: Table, options: argparse.Namespace, recipe: str, batches: Sequence[int]) -> None:
    """Time a denoising step and whole pictures against diffusers."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(recipe, folder)
        pipe = LatentPipeline.from_pretrained(folder, device=DEVICE, dtype=dtype)
        peers = {name: diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(DEVICE)
                 for name in ("diffusers", "tuned", *(["tuned, compiled"] if options.compiled else []))}  # fmt: skip
    for name, peer in peers.items():
        peer.set_progress_bar_config(disable=True)
        if name != "diffusers":
            for part in (peer.unet, peer.vae):
                part.to(memory_format=torch.channels_last)
                part.fuse_qkv_projections()
        if name == "tuned, compiled":
            peer.unet = torch.compile(peer.unet, mode="reduce-overhead", fullgraph=True)
            peer.vae.decode = torch.compile(peer.vae.decode, mode="reduce-overhead", fullgraph=True)
    for batch in batches:
        time_network(table, pipe, peers["diffusers"], recipe, batch)
    for batch in batches:
        prompts = [CAPTIONS[index % len(CAPTIONS)] for index in range(batch)]
        noise = torch.randn(batch, 4, 32, 32, generator=torch.Generator().manual_seed(1))
        ours: Any = partial(pipe, prompts, num_steps=25, guidance_scale=5.0, latents=noise, progress=False,
                            sampler="ddim", batch_size=batch)  # fmt: skip
        results = {"ours": partial(as_array, ours)}
        for name, peer in peers.items():
            if name == "tuned, compiled" and batch > 1:  # compiling once more for every batch takes minutes
                continue
            results[name] = partial(as_array, partial(from_peer, peer, prompts, noise.to(DEVICE, dtype)))
        pictures = {name: call() for name, call in results.items()}
        number = {1: 7, 8: 3}.get(batch, 2)
        seconds = {name: median_seconds(call, number, 1) for name, call in results.items()}
        values: dict[str, Any] = {"ms": 1e3 * seconds["ours"], "pictures_a_second": batch / seconds["ours"]}
        for name in list(results)[1:]:
            difference = np.abs(pictures["ours"].astype(int) - pictures[name])
            values |= {f"{name}_ms": 1e3 * seconds[name], f"{name}_by_ours": seconds[name] / seconds["ours"],
                       f"mean_difference_to_{name}": float(difference.mean())}  # fmt: skip
        table.add(f"25 steps to pictures, {recipe}, batch {batch}, guidance 5", **values)


def from_peer(peer: Any, prompts: list[str], noise: torch.Tensor) -> list[Any]:
    images: list[Any] = peer(prompts, num_inference_steps=25, guidance_scale=5.0, latents=noise).images
    return images


def as_array(call: Callable[[], list[Any]]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(image) for image in call()])


def time_network(table: Table, pipe: LatentPipeline, peer: Any, recipe: str, batch: int) -> None:
    """Time one denoising step: both halves of guidance, which is a batch of 2 x batch for the UNet."""
    dtype = pipe.unet.conv_in.weight.dtype
    x = torch.randn(batch, 4, 32, 32, device=DEVICE)
    context = torch.randn(2 * batch, pipe.text_encoder.max_length, pipe.text_encoder.context_dim, device=DEVICE)
    t, twice = torch.tensor(500, device=DEVICE), torch.cat([x, x]).to(dtype)
    with torch.no_grad():
        ours, eager = (CachedNetwork(network, context.to(dtype), [500]) for network in (pipe.network, pipe.unet))
        one, other = ours(x, 500), eager(x, 500)
        graphed, plain = (median_seconds(partial(each, x, 500)) for each in (ours, eager))
        theirs = median_seconds(partial(peer.unet, twice, t, context.to(dtype), return_dict=False))
    table.add(f"denoising step, {recipe}, batch {batch}", ms=1e3 * graphed, eager_ms=1e3 * plain,
              diffusers_ms=1e3 * theirs, diffusers_by_ours=theirs / graphed, graph_equals_eager=torch.equal(one, other),
              largest_difference=float((one - other).abs().max()))  # fmt: skip


def xformers(table: Table, options: argparse.Namespace) -> None:
    """Time attention through xformers against PyTorch's, forward and backward."""
    unet, encoder = new_unet("emoji-256")
    x = torch.randn(32, 4, 32, 32, device=DEVICE)
    context, t = torch.randn(32, 24, encoder.context_dim, device=DEVICE), torch.full((32,), 500, device=DEVICE)

    def both_ways() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            output = unet(x, t, context)
        output.float().square().mean().backward()

    seconds = {}
    for name in ("sdpa", "xformers"):
        unet.set_attention_backend(name)
        seconds[name] = median_seconds(both_ways, 8)
    table.add("forward and backward, UNet of emoji-256, batch 32", sdpa_ms=1e3 * seconds["sdpa"],
              xformers_ms=1e3 * seconds["xformers"])  # fmt: skip


def main() -> int:
    """Run the command; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="unet,vae,draw,sd1,xformers", help="which parts")
    parser.add_argument("--compiled", action="store_true", help="compiled models, too; each takes about a minute")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN try its algorithms for every shape")
    parser.add_argument("--profile", action="store_true", help="print what a training step is made of")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")  # as in training
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    table = Table(options.output)
    peak = ceiling()
    kernels = norms.kernels_for(torch.device(DEVICE, 0) if ON_GPU else torch.device("cpu"))
    table.add("setup", device=torch.cuda.get_device_name() if ON_GPU else "cpu", torch=torch.__version__,
              matrix_product_TFLOP_a_second=peak / 1e12, norms=kernels.__name__)  # fmt: skip
    few = not ON_GPU
    parts: dict[str, Callable[[], None]] = {
        "unet": lambda: train_unet(table, options, peak, "emoji-256", (2,) if few else (64, 128, 256)),
        "vae": lambda: train_vae(table, options, peak, (1,) if few else (16, 64)),
        "draw": lambda: draw(table, options, "emoji-256", (1,) if few else (1, 8, 32)),
        "sd1": lambda: train_unet(table, options, peak, "sd1", (2,) if few else (64,)),
        "xformers": lambda: xformers(table, options),
    }
    failed = 0
    for name in options.only.split(","):
        try:
            parts[name]()
        except Exception:  # the other parts are still worth measuring
            traceback.print_exc()
            failed += 1
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
