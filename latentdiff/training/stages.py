"""The stages of a run: VAE training, caches, latent training. A finished stage is skipped, an interrupted one resumed.

<output>/run.json                  record of every launch: config, versions, seed, git
<output>/train_vae/, train_latent/ checkpoints, log.jsonl, preview images
<output>/vae/                      finished VAE
<output>/cache/                    latents and text features
<output>/model/                    finished model, in diffusers' layout
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from text_encoder import TextEncoder, TextEncoderError, train_tokenizer
from unet import UNet
from vae import VAE

from ..assets import part_folder
from ..config import Config
from ..data.cache import LatentCache, TextCache, pictures_digest
from ..data.shards import Shards, changed_inputs, remove_others
from ..data.sources import Source, open_source
from ..diffusion.process import Process
from ..errors import LatentDiffError
from ..files.export import save_model
from ..files.open import read_json
from ..files.scheduler import read_scheduler, scheduler_config
from .fingerprint import fingerprint, first_difference
from .latent import LatentTraining
from .launch import Launch, launch
from .loop import run_training
from .vae import VAETraining
from .vae_finish import finish_vae

Caches = tuple[LatentCache | None, TextCache | None]


def train_vae(config: Config, run: Launch | None = None) -> Path:
    """Train the VAE, normalize its latents, save it to `<output>/vae` and return that folder.

    Raises:
        LatentDiffError: the config or data cannot be used, or training stopped early (`Stopped`).
    """
    run = run or launch(config)
    folder = run.folder / "vae"
    settings = fingerprint(run, "vae", "train_vae")
    if config.vae.pretrained:
        raise LatentDiffError(
            f"vae.pretrained={config.vae.pretrained}: this VAE is already trained; remove the setting to train one"
        )
    if _is_done(folder, settings, config.train_vae.steps, run):
        return folder
    check_batches(run)
    sources = open_source(config.data)
    torch.manual_seed(config.seed)  # torch's global generator is used only for the initial weights
    task = VAETraining(run, run.folder / "train_vae", sources, VAE(config.vae.build(config.data.image_size)))
    run_training(task, run, run.folder / "train_vae")
    finish_vae(task, run, folder)
    _mark_done(folder, settings, config.train_vae.steps, run)
    return folder


def encode(config: Config, run: Launch | None = None) -> tuple[Caches, Caches]:
    """Fill and return the training and validation caches: latents, and text features if the text encoder is frozen."""
    run = run or launch(config)
    vae = open_vae(run)
    sources = open_source(config.data)
    torch.manual_seed(config.seed)
    return make_caches(run, sources, vae, open_text_encoder(config, sources[0]).to(run.device))


def train_latent(config: Config, run: Launch | None = None) -> Path:
    """Train the UNet, and the text encoder unless frozen, save the model to `<output>/model` and return it.

    Raises:
        LatentDiffError: the config or data cannot be used, there is no VAE yet, or training stopped early (`Stopped`).
    """
    run = run or launch(config)
    folder = run.folder / "model"
    vae = open_vae(run)
    settings = fingerprint(run, "vae", "text_encoder", "unet", "diffusion", "train_latent")
    if _is_done(folder, settings, config.train_latent.steps, run):
        return folder
    check_batches(run)
    scheduler_config(config.diffusion.process())  # raises now if the scheduler could not be saved at the end
    sources = open_source(config.data)
    torch.manual_seed(config.seed)
    text_encoder = open_text_encoder(config, sources[0]).to(run.device)
    unet = new_unet(config, vae, text_encoder)
    for line in _pretrained_warnings(config):
        run.report(f"warning: unet.pretrained={config.unet.pretrained}: {line}")
    caches = make_caches(run, sources, vae, text_encoder)
    task = LatentTraining(run, run.folder / "train_latent", sources, vae, unet, text_encoder, caches)
    run_training(task, run, run.folder / "train_latent")
    averaged, text_encoder = task.finish()
    if run.is_main:
        save_model(folder, vae=vae.cpu(), unet=averaged, text_encoder=text_encoder, process=config.diffusion.process())
    _mark_done(folder, settings, config.train_latent.steps, run)
    run.report(f"model saved to {folder}")
    return folder


def train(config: Config) -> Path:
    """Run all unfinished stages and return the folder of the model; raises as `train_latent` does."""
    run = launch(config)
    preflight(run)
    if not config.vae.pretrained:
        train_vae(config, run)
    return train_latent(config, run)


def preflight(run: Launch) -> None:
    """Check data, vocabulary, batch sizes and models now rather than fail in the last stage after hours of training."""
    config = run.config
    check_batches(run)
    scheduler_config(config.diffusion.process())
    encoder = open_text_encoder(config, open_source(config.data)[0])
    pretrained = config.vae.pretrained
    vae = VAE.from_pretrained(part_folder(pretrained, "vae")) if pretrained else None
    with torch.device("meta"):
        new_unet(config, vae or VAE(config.vae.build(config.data.image_size)), encoder)


def check_batches(run: Launch) -> None:
    """Raise unless the batches of both stages divide evenly among the processes."""
    for name, section in (("train_vae", run.config.train_vae), ("train_latent", run.config.train_latent)):
        try:
            run.batch_plan(section)
        except LatentDiffError as error:
            raise LatentDiffError(f"{name}.{error}") from None


def open_vae(run: Launch) -> VAE:
    """Load the VAE named in the config or trained by this run; raise if there is none or it does not fit image_size."""
    pretrained = run.config.vae.pretrained
    folder = Path(part_folder(pretrained, "vae")) if pretrained else run.folder / "vae"
    if not pretrained and not (folder / "done.json").is_file():
        raise LatentDiffError(
            f"{folder}: no finished VAE; run train_vae.py with the same config first, "
            "or name a trained one with vae.pretrained=FOLDER (`latentdiff train` runs both stages)"
        )
    if not pretrained:
        _is_done(folder, fingerprint(run, "vae", "train_vae"), 0, run, quiet=True)  # raises if the settings differ
    vae = VAE.from_pretrained(folder)
    size, factor = run.config.data.image_size, vae.config.downsampling
    if size % factor:
        raise LatentDiffError(
            f"data.image_size={size}: expected a multiple of {factor}, the downsampling factor of the VAE in {folder}"
        )
    return vae.to(run.device)


def open_text_encoder(config: Config, source: Source) -> TextEncoder:
    """Load the text encoder named in the config, or create one with a vocabulary learned from the captions."""
    section = config.text_encoder
    if section.pretrained:
        folder = part_folder(section.pretrained, "text_encoder")
        try:
            return TextEncoder.from_pretrained(folder, max_length=section.max_length)
        except TextEncoderError as error:
            raise LatentDiffError(f"text_encoder.pretrained={section.pretrained}: text_encoder.{error}"
                                  if str(error).startswith("max_length") else str(error)) from None  # fmt: skip
    captions = (caption for several in source.all_captions() for caption in several)
    tokenizer = train_tokenizer(captions, vocab_size=section.vocab_size, max_length=section.max_length)
    return TextEncoder.new(section.build(), tokenizer)


def new_unet(config: Config, vae: VAE, text_encoder: TextEncoder) -> UNet:
    """Create or load the UNet of the config; raise unless it fits the VAE and the text encoder."""
    size = config.data.image_size // vae.config.downsampling
    channels, width = vae.config.latent_channels, text_encoder.context_dim
    if pretrained := config.unet.pretrained:
        unet = _pretrained_unet(config, pretrained, channels, width)
        unet.config = replace(unet.config, sample_size=size)
    else:
        unet = UNet(config.unet.build(channels, width, size))
    unet.set_attention_backend(config.unet.attention)
    return unet


def _pretrained_unet(config: Config, pretrained: str, channels: int, width: int) -> UNet:
    folder = Path(part_folder(pretrained, "unet"))
    with torch.device("cpu"):  # also if called under the meta device
        unet, saved = UNet.from_pretrained(folder), _saved_process(folder.parent)
    for what, needed in (("in_channels", channels), ("out_channels", channels), ("context_dim", width)):
        if (found := getattr(unet.config, what)) != needed:
            raise LatentDiffError(f"unet.pretrained={pretrained}: its {what} is {found}; this VAE and this text "
                                  f"encoder need {needed}")  # fmt: skip
    if saved is not None and saved.prediction != config.diffusion.prediction:
        raise LatentDiffError(f"unet.pretrained={pretrained}: it predicts {saved.prediction}, but diffusion.prediction="
                              f"{config.diffusion.prediction}; set it to {saved.prediction}")  # fmt: skip
    return unet


def _saved_process(model: Path) -> Process | None:
    """The prediction and noise schedule of a saved model, or None if it has no scheduler config."""
    path = model / "scheduler" / "scheduler_config.json"
    return read_scheduler(read_json(path, ""), path) if path.is_file() else None


def _pretrained_warnings(config: Config) -> Iterator[str]:
    """Yield warnings about settings that do not match the pretrained UNet, which is usually an oversight."""
    if not config.unet.pretrained:
        return
    if not config.text_encoder.pretrained:
        yield "it does not know a new text encoder; set text_encoder.pretrained to the one it was trained with"
    saved = _saved_process(Path(part_folder(config.unet.pretrained, "unet")).parent)
    if saved is not None and not torch.equal(saved.schedule.betas, config.diffusion.build().betas):
        yield "it was trained with another noise schedule than the one in `diffusion`; check zero_terminal_snr"


def make_caches(run: Launch, sources: tuple[Source, Source], vae: VAE, encoder: TextEncoder) -> tuple[Caches, Caches]:
    """Build the training and validation caches; caches computed from other inputs are deleted."""
    folder, config = run.folder / "cache", run.config
    vae.eval()
    caches: list[Caches] = []
    for source, name, flips in zip(sources, ("train", "validation"), (config.data.flip, False), strict=True):
        latents, text = None, None
        if config.train_latent.cache:
            memo = folder / f"{name}-pictures.json"
            if run.is_main:
                pictures_digest(source, memo)  # reads every image, so only one process does it
            run.accelerator.wait_for_everyone()
            data = config.data if name == "train" else config.data.model_copy(update={"max_broken": 1.0})
            latents = LatentCache(folder / f"{name}-latents", source, vae, data, flips=flips, memo=memo)
            _build_cache(run, latents, latents.shards, f"{name} pictures")
        if config.train_latent.cache and not config.text_encoder.train:
            text = TextCache(folder / f"{name}-text", source, encoder.eval())
            _build_cache(run, text, text.shards, f"{name} captions")
        caches.append((latents, text))
    return caches[0], caches[1]


def _build_cache(run: Launch, cache: LatentCache | TextCache, shards: Shards, what: str) -> None:
    stale = changed_inputs(shards.folder.parent, shards.inputs)
    if stale and not shards.folder.exists():
        run.report(f"the cache of {what} is outdated ({', '.join(stale)} changed) and will be rebuilt")
    hidden = not run.is_main or (shards.folder / "complete.json").is_file()
    with tqdm(total=shards.num_rows, desc=f"encoding {what}", unit="", disable=hidden) as bar:

        def progress(rows: int) -> None:
            bar.update(min(rows * run.accelerator.num_processes, shards.num_rows - int(bar.n)))  # assumes equal speed

        cache.build(run.accelerator, progress)
    if run.is_main:
        remove_others(shards.folder.parent, {shards.folder.name})
    run.accelerator.wait_for_everyone()


def _is_done(folder: Path, settings: dict[str, Any], steps: int, run: Launch, *, quiet: bool = False) -> bool:
    """Whether the stage finished at least `steps` steps; raise if it was run with other settings."""
    try:
        done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        before, taken = done["facts"], done["steps"]
    except (OSError, ValueError, KeyError):
        return False
    difference = first_difference(before, {name: now for name, now in settings.items() if name != "precision"})
    if difference is not None:
        name, previous, new = difference
        raise LatentDiffError(
            f"{folder}: was made with {name}={previous!r}, but it is now {new!r}; choose another `output`, "
            "or delete the folder and its checkpoints to start over"
        )
    if taken < steps:
        return False
    if not quiet:
        run.report(f"{folder}: already done")
    return True


def _mark_done(folder: Path, settings: dict[str, Any], steps: int, run: Launch) -> None:
    if run.is_main:
        partial = folder / "done.json.partial"
        partial.write_text(json.dumps({"steps": steps, "facts": settings}, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / "done.json")
    run.accelerator.wait_for_everyone()
