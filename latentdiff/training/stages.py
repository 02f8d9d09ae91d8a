"""The stages of a run, in order: vae -> caches -> latent. Each skips what is done and goes on where it was stopped.

<output>/run.json                  what was run: config, versions, seed, git
<output>/train_vae/, train_latent/ checkpoints, log.jsonl, pictures to look at
<output>/vae/                      the finished VAE
<output>/cache/                    latents and text features
<output>/model/                    the finished model, as diffusers opens it
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
from ..data.shards import Shards, differences, remove_others
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
    """Train the autoencoder, normalise its latents, and write it to <output>/vae.

    Raises:
        LatentDiffError: bad input, or training stopped early (`Stopped`).
    """
    run = run or launch(config)
    folder = run.folder / "vae"
    facts = fingerprint(run, "vae", "train_vae")
    if config.vae.pretrained:
        raise LatentDiffError(
            f"vae.pretrained={config.vae.pretrained}: there is no VAE to train; leave it out to train one"
        )
    if _is_done(folder, facts, config.train_vae.steps, run):
        return folder
    check_batches(run)
    sources = open_source(config.data)
    torch.manual_seed(config.seed)  # the only use of torch's own generator: the first weights
    task = VAETraining(run, run.folder / "train_vae", sources, VAE(config.vae.build(config.data.image_size)))
    run_training(task, run, run.folder / "train_vae")
    finish_vae(task, run, folder)
    _mark_done(folder, facts, config.train_vae.steps, run)
    return folder


def encode(config: Config, run: Launch | None = None) -> tuple[Caches, Caches]:
    """Fill the caches of training and validation: latents, and text features where the text encoder is frozen."""
    run = run or launch(config)
    vae = open_vae(run)
    sources = open_source(config.data)
    torch.manual_seed(config.seed)
    return make_caches(run, sources, vae, open_text_encoder(config, sources[0]).to(run.device))


def train_latent(config: Config, run: Launch | None = None) -> Path:
    """Train the UNet, and the text encoder with it, on cached latents; write the model to <output>/model.

    Raises:
        LatentDiffError: bad input, no VAE yet, or training stopped early (`Stopped`).
    """
    run = run or launch(config)
    folder = run.folder / "model"
    vae = open_vae(run)
    facts = fingerprint(run, "vae", "text_encoder", "unet", "diffusion", "train_latent")
    if _is_done(folder, facts, config.train_latent.steps, run):
        return folder
    check_batches(run)
    scheduler_config(config.diffusion.process())  # refuses now what could not be written at the end
    sources = open_source(config.data)
    torch.manual_seed(config.seed)
    text_encoder = open_text_encoder(config, sources[0]).to(run.device)
    unet = new_unet(config, vae, text_encoder)
    for line in _doubts(config):
        run.report(f"warning: unet.pretrained={config.unet.pretrained}: {line}")
    caches = make_caches(run, sources, vae, text_encoder)
    task = LatentTraining(run, run.folder / "train_latent", sources, vae, unet, text_encoder, caches)
    run_training(task, run, run.folder / "train_latent")
    averaged, text_encoder = task.finish()
    if run.is_main:
        save_model(folder, vae=vae.cpu(), unet=averaged, text_encoder=text_encoder, process=config.diffusion.process())
    _mark_done(folder, facts, config.train_latent.steps, run)
    run.report(f"the model is in {folder}")
    return folder


def train(config: Config) -> Path:
    """Everything that is missing of vae, caches and latent training; returns the model's folder."""
    run = launch(config)
    preflight(run)
    if not config.vae.pretrained:
        train_vae(config, run)
    return train_latent(config, run)


def preflight(run: Launch) -> None:
    """Find out now what would stop the last stage after hours in the first.

    Raises:
        LatentDiffError: pictures, captions, vocabulary, batch sizes or the prediction do not work out.
    """
    config = run.config
    check_batches(run)
    scheduler_config(config.diffusion.process())
    encoder = open_text_encoder(config, open_source(config.data)[0])
    named = config.vae.pretrained
    vae = VAE.from_pretrained(part_folder(named, "vae")) if named else None
    with torch.device("meta"):
        new_unet(config, vae or VAE(config.vae.build(config.data.image_size)), encoder)


def check_batches(run: Launch) -> None:
    """Refuse batches that the processes cannot share evenly.

    Raises:
        LatentDiffError: naming the section.
    """
    for name, section in (("train_vae", run.config.train_vae), ("train_latent", run.config.train_latent)):
        try:
            run.batch_plan(section)
        except LatentDiffError as error:
            raise LatentDiffError(f"{name}.{error}") from None


def open_vae(run: Launch) -> VAE:
    """The VAE that the config names, or the one that this run trained.

    Raises:
        LatentDiffError: there is none yet, or it does not fit the pictures.
    """
    named = run.config.vae.pretrained
    folder = Path(part_folder(named, "vae")) if named else run.folder / "vae"
    if not named and not (folder / "done.json").is_file():
        raise LatentDiffError(
            f"{folder}: no finished VAE; run train_vae.py with the same config first, "
            "or name a trained one with vae.pretrained=FOLDER (`latentdiff train` does both stages)"
        )
    if not named:
        _is_done(folder, fingerprint(run, "vae", "train_vae"), 0, run, quiet=True)  # raises where it is another one
    vae = VAE.from_pretrained(folder)
    size, factor = run.config.data.image_size, vae.config.downsampling
    if size % factor:
        raise LatentDiffError(f"data.image_size={size}: expected a multiple of {factor}, the downsampling of {folder}")
    return vae.to(run.device)


def open_text_encoder(config: Config, source: Source) -> TextEncoder:
    """The text encoder that the config names, or a new one with a vocabulary learnt from the captions."""
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
    """The UNet that the config describes or names, for this VAE and this text encoder.

    Raises:
        LatentDiffError, UNetError: the one it names is not there, or does not fit them.
    """
    size = config.data.image_size // vae.config.downsampling
    channels, width = vae.config.latent_channels, text_encoder.context_dim
    if named := config.unet.pretrained:
        unet = _pretrained_unet(config, named, channels, width)
        unet.config = replace(unet.config, sample_size=size)
    else:
        unet = UNet(config.unet.build(channels, width, size))
    unet.set_attention_backend(config.unet.attention)
    return unet


def _pretrained_unet(config: Config, named: str, channels: int, width: int) -> UNet:
    folder = Path(part_folder(named, "unet"))
    with torch.device("cpu"):  # also where shapes alone are asked for
        unet, learnt = UNet.from_pretrained(folder), _process(folder.parent)
    for what, needed in (("in_channels", channels), ("out_channels", channels), ("context_dim", width)):
        if (found := getattr(unet.config, what)) != needed:
            raise LatentDiffError(f"unet.pretrained={named}: its {what} is {found}; this VAE and this text encoder "
                                  f"need {needed}")  # fmt: skip
    if learnt is not None and learnt.prediction != config.diffusion.prediction:
        raise LatentDiffError(f"unet.pretrained={named}: it predicts {learnt.prediction}, and diffusion.prediction="
                              f"{config.diffusion.prediction}; set that to {learnt.prediction}")  # fmt: skip
    return unet


def _process(model: Path) -> Process | None:
    """What the UNet of a model's folder predicts, under which schedule; None where nothing says it."""
    path = model / "scheduler" / "scheduler_config.json"
    return read_scheduler(read_json(path, ""), path) if path.is_file() else None


def _doubts(config: Config) -> Iterator[str]:
    """What a UNet that exists may know nothing of: it can be meant so, and is mostly a setting forgotten."""
    if not config.unet.pretrained:
        return
    if not config.text_encoder.pretrained:
        yield "it knows nothing of a new text encoder's features; text_encoder.pretrained names the one that it knows"
    learnt = _process(Path(part_folder(config.unet.pretrained, "unet")).parent)
    if learnt is not None and not torch.equal(learnt.schedule.betas, config.diffusion.build().betas):
        yield "it was trained under another noise schedule than that of `diffusion` here, perhaps zero_terminal_snr"


def make_caches(run: Launch, sources: tuple[Source, Source], vae: VAE, encoder: TextEncoder) -> tuple[Caches, Caches]:
    """Caches for training and for validation; what was computed from something else is not used, and deleted."""
    folder, config = run.folder / "cache", run.config
    vae.eval()
    caches: list[Caches] = []
    for source, name, flips in zip(sources, ("train", "validation"), (config.data.flip, False), strict=True):
        latents, text = None, None
        if config.train_latent.cache:
            memo = folder / f"{name}-pictures.json"
            if run.is_main:
                pictures_digest(source, memo)  # reads all pictures, once for all processes
            run.accelerator.wait_for_everyone()
            data = config.data if name == "train" else config.data.model_copy(update={"max_broken": 1.0})
            latents = LatentCache(folder / f"{name}-latents", source, vae, data, flips=flips, memo=memo)
            _fill(run, latents, latents.shards, f"{name} pictures")
        if config.train_latent.cache and not config.text_encoder.train:
            text = TextCache(folder / f"{name}-text", source, encoder.eval())
            _fill(run, text, text.shards, f"{name} captions")
        caches.append((latents, text))
    return caches[0], caches[1]


def _fill(run: Launch, cache: LatentCache | TextCache, shards: Shards, what: str) -> None:
    stale = differences(shards.folder.parent, shards.facts)
    if stale and not shards.folder.exists():
        run.report(f"the cache of {what} was made from something else ({', '.join(stale)} changed): made again")
    hidden = not run.is_main or (shards.folder / "complete.json").is_file()
    with tqdm(total=shards.num_rows, desc=f"encoding {what}", unit="", disable=hidden) as bar:

        def progress(rows: int) -> None:
            bar.update(min(rows * run.accelerator.num_processes, shards.num_rows - int(bar.n)))  # others go as fast

        cache.build(run.accelerator, progress)
    if run.is_main:
        remove_others(shards.folder.parent, {shards.folder.name})
    run.accelerator.wait_for_everyone()


def _is_done(folder: Path, facts: dict[str, Any], steps: int, run: Launch, *, quiet: bool = False) -> bool:
    """Whether the stage is finished, with as many steps; one finished with other settings is an error."""
    try:
        done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
        before, taken = done["facts"], done["steps"]
    except (OSError, ValueError, KeyError):
        return False
    difference = first_difference(before, {name: now for name, now in facts.items() if name != "precision"})
    if difference is not None:
        name, former, new = difference
        raise LatentDiffError(
            f"{folder}: was made with {name}={former!r} and now it is {new!r}; choose another `output`, "
            "or delete the folder and its training to make it again"
        )
    if taken < steps:
        return False
    if not quiet:
        run.report(f"{folder}: done already")
    return True


def _mark_done(folder: Path, facts: dict[str, Any], steps: int, run: Launch) -> None:
    if run.is_main:
        partial = folder / "done.json.partial"
        partial.write_text(json.dumps({"steps": steps, "facts": facts}, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / "done.json")
    run.accelerator.wait_for_everyone()
