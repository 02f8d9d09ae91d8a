"""The stages of a run: VAE training, caches, latent training. A finished stage is skipped, an interrupted one resumed.

<output>/run.json                  record of every launch: config, versions, seed, git, how it ended
<output>/data.json                 how many pictures there are, and what was left out
<output>/train_vae/, train_latent/ checkpoints, log.jsonl, preview images
<output>/vae/                      finished VAE
<output>/cache/                    latents and text features
<output>/model/                    finished model, in diffusers' layout
<output>/report.html               all of this on one page
"""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from text_encoder import TextEncoder, TextEncoderError, train_tokenizer
from vae import VAE

from ..config import Config
from ..data.batches import check_halves
from ..data.cache import LatentCache, TextCache, pictures_digest
from ..data.shards import changed_inputs, remove_others
from ..data.sources import Source
from ..errors import LatentDiffError
from ..files.export import begin_model, save_model
from ..files.unfinished import find_part
from .broken import say_what_is_broken
from .done import ORIGIN, find_done, mark_done
from .fingerprint import fingerprint
from .latent import LatentTraining
from .launch import Launch, launched
from .loop import run_training
from .parallel import gather_full
from .pictures import open_pictures, say_what_is_cut_off
from .start import new_unet, pretrained_warnings
from .vae import VAETraining
from .vae_finish import finish_seconds, finish_vae, kept_encodings

Caches = tuple[LatentCache | None, TextCache | None]


def train_vae(config: Config, run: Launch | None = None, share: float | None = None) -> Path:
    """Train the VAE, normalize its latents, save it to `<output>/vae` and return that folder.

    If there is a budget, it has all of it, or else `share` of what is left when it begins.

    Raises:
        LatentDiffError: the config or data cannot be used, or training stopped early (`Stopped`).
    """
    with launched(config, run) as run:
        folder = run.folder / "vae"
        settings = fingerprint(run, "vae", "train_vae")
        if config.vae.pretrained:
            raise LatentDiffError(
                f"vae.pretrained={config.vae.pretrained}: this VAE is already trained; remove the setting to train one"
            )
        # A larger budget for all stages is for those after the VAE, as latents of another VAE would not fit the UNet.
        enough = 0.0 if run.budget is not None and share else run.budget
        if (done := find_done(folder, settings, run, steps=config.train_vae.steps, budget=enough)) is not None:
            run.report(f"{folder}: already done")
            run.clock.go_on_from(done.get("seconds", 0.0) if share else 0.0)
            return folder
        check_batches(run)
        sources = open_pictures(run)
        torch.manual_seed(config.seed)  # torch's global generator is used only for the initial weights
        task = VAETraining(run, run.folder / "train_vae", sources, VAE(config.vae.build(config.data.image_size)))
        begin, limit = run.clock.elapsed(), run.budget
        if limit is not None and share:
            limit = begin + share * max(0.0, limit - begin)
        run_training(task, run, run.folder / "train_vae", limit, finishing=partial(finish_seconds, task, run))
        finish_vae(task, run, folder)
        mark_done(folder, settings, task.timetable.steps, run, shared=share is not None)
        return folder


def encode(config: Config, run: Launch | None = None) -> tuple[Caches, Caches]:
    """Fill and return the training and validation caches: latents, and text features if the text encoder is frozen."""
    with launched(config, run) as run:
        vae = open_vae(run)
        sources = open_pictures(run)
        torch.manual_seed(config.seed)
        return make_caches(run, sources, vae, open_text_encoder(config, sources[0]).to(run.device))


def train_latent(config: Config, run: Launch | None = None) -> Path:
    """Train the UNet, and the text encoder unless frozen, save the model to `<output>/model` and return it.

    Raises:
        LatentDiffError: the config or data cannot be used, there is no VAE yet, or training stopped early (`Stopped`).
    """
    with launched(config, run) as run:
        folder = run.folder / "model"
        vae = open_vae(run)
        settings = fingerprint(run, "vae", "text_encoder", "unet", "diffusion", "train_latent")
        if find_done(folder, settings, run, steps=config.train_latent.steps, budget=run.budget) is not None:
            run.report(f"{folder}: already done")
            return folder
        task = new_latent_training(run, vae)
        run_training(task, run, run.folder / "train_latent", run.budget, begin=partial(_begin_model, task, run, folder))
        _save_average(task, run, folder)
        best = task.best.tensors() if config.train_latent.keep_best else None
        if best is not None:
            _save_average(task, run, run.folder / "model-best", best)
        mark_done(folder, settings, task.timetable.steps, run)
        run.report(f"model saved to {folder}" + (f"; {_best_sentence(task, run)}" if best is not None else ""))
        return folder


def new_latent_training(run: Launch, vae: VAE) -> LatentTraining:
    """Open the pictures, create the models and the caches that are missing: latent training before its first step."""
    config = run.config
    check_batches(run)
    sources = open_pictures(run)
    torch.manual_seed(config.seed)
    text_encoder = open_text_encoder(config, sources[0]).to(run.device)
    say_what_is_cut_off(run, sources, text_encoder)
    unet = new_unet(config, vae, text_encoder)
    for line in pretrained_warnings(config):
        run.report(f"warning: {line}")
    caches = make_caches(run, sources, vae, text_encoder)
    return LatentTraining(run, run.folder / "train_latent", sources, vae, unet, text_encoder, caches)


def _save_average(task: LatentTraining, run: Launch, folder: Path, average: Mapping[str, Tensor] | None = None) -> None:
    """Save a model with an EMA of the weights, by default the present one; all processes call this."""
    unet, text_encoder = task.finish(average)
    if run.is_main:
        save_model(folder, vae=task.frozen.vae.cpu(), unet=unet, text_encoder=text_encoder,
                   process=run.config.diffusion.process())  # fmt: skip
        (folder / ORIGIN).unlink(missing_ok=True)  # of an average that was there before


def _best_sentence(task: LatentTraining, run: Launch) -> str:
    assert task.best.record is not None
    step = task.best.record["step"]
    passes = step * task.section.batch_size / len(task.source)
    return (f"the held-out loss without captions was lowest at step {step} of {task.timetable.steps}, after "
            f"{passes:.1f} passes over the pictures: {run.folder / 'model-best'} has the EMA of that step")  # fmt: skip


def _begin_model(task: LatentTraining, run: Launch, folder: Path) -> None:
    """Write what is not trained, so that from now on every checkpoint can be opened as a model."""
    encoder = task.text_encoder
    frozen = {name: gather_full(p) for name, p in encoder.model.named_parameters() if not p.requires_grad}
    if run.is_main:
        begin_model(folder, vae=task.frozen.vae, unet=task.inner.unet, text_encoder=encoder, frozen=frozen,
                    process=run.config.diffusion.process())  # fmt: skip
    run.accelerator.wait_for_everyone()


def train(config: Config, run: Launch | None = None) -> Path:
    """Run all unfinished stages and return the folder of the model; raises as `train_latent` does."""
    with launched(config, run) as run:
        preflight(run)
        if not config.vae.pretrained:
            train_vae(config, run, config.budget_share)
        return train_latent(config, run)


def preflight(run: Launch) -> None:
    """Check data, vocabulary, batch sizes and models now rather than fail in the last stage after hours of training."""
    config = run.config
    check_batches(run)
    sources = open_pictures(run)
    encoder = open_text_encoder(config, sources[0])
    say_what_is_cut_off(run, sources, encoder)
    pretrained = config.vae.pretrained
    vae = VAE.from_pretrained(find_part(pretrained, "vae")) if pretrained else None
    with torch.device("meta"):
        unet = new_unet(config, vae or VAE(config.vae.build(config.data.image_size)), encoder)
    check_halves(unet.config.trajectory_attention, run.batch_plan(config.train_latent).pictures_per_pass)


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
    folder = Path(find_part(pretrained, "vae")) if pretrained else run.folder / "vae"
    if not pretrained and not (folder / "done.json").is_file():
        raise LatentDiffError(
            f"{folder}: no finished VAE; run train_vae.py with the same config first, "
            "or name a trained one with vae.pretrained=FOLDER (`latentdiff train` runs both stages)"
        )
    if not pretrained:
        find_done(folder, fingerprint(run, "vae", "train_vae"), run)  # raises if the settings differ
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
        folder = find_part(section.pretrained, "text_encoder")
        try:
            return TextEncoder.from_pretrained(folder, max_length=section.max_length)
        except TextEncoderError as error:
            raise LatentDiffError(f"text_encoder.pretrained={section.pretrained}: text_encoder.{error}"
                                  if str(error).startswith("max_length") else str(error)) from None  # fmt: skip
    captions = (caption for several in source.all_captions() for caption in several)
    tokenizer = train_tokenizer(captions, vocab_size=section.vocab_size, max_length=section.max_length)
    return TextEncoder.new(section.build(), tokenizer)


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
            kept = kept_encodings(vae, source, run) if name == "train" else None
            latents = LatentCache(folder / f"{name}-latents", source, vae, data, flips=flips, memo=memo,
                                  encoded=kept.encoded if kept else None, workers=config.workers)  # fmt: skip
            _build_cache(run, latents, f"{name} pictures")
            say_what_is_broken(run, name, latents)
        if config.train_latent.cache and not config.text_encoder.train:
            text = TextCache(folder / f"{name}-text", source, encoder.eval())
            _build_cache(run, text, f"{name} captions")
        caches.append((latents, text))
    if run.is_main:
        shutil.rmtree(folder / "train-encodings", ignore_errors=True)
    return caches[0], caches[1]


def _build_cache(run: Launch, cache: LatentCache | TextCache, what: str) -> None:
    shards = cache.shards
    stale = changed_inputs(shards.folder.parent, shards.inputs)
    if stale and not shards.folder.exists():
        run.report(f"the cache of {what} is outdated ({', '.join(stale)} changed) and will be rebuilt")
    cache.build(run.accelerator, f"encoding {what}")
    if run.is_main:
        remove_others(shards.folder.parent, {shards.folder.name})
    run.accelerator.wait_for_everyone()
