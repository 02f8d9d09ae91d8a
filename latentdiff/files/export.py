"""Writing a model: a folder for diffusers' StableDiffusionPipeline or a single file; model card and upload."""

from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from text_encoder import TextEncoder
from unet import Denoiser, Experts, UNet
from vae import VAE

from ..assets import INDEX
from ..diffusion.process import Process
from ..errors import LatentDiffError, reraise_as
from .card import model_card
from .experts import PIPELINE, begin_configs, save_unet
from .open import find_model, open_model
from .scheduler import saved_config, scheduler_config
from .tensors import staged, to_json

DIFFUSERS_VERSION = "0.42.1"  # of this layout; the inpainting pipeline rejects a model without it


def save_model(
    folder: Path,
    *,
    vae: VAE,
    unet: Denoiser,
    text_encoder: TextEncoder,
    process: Process,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Write all parts, and model_index.json last: a folder that has one is complete.

    `dtype` None keeps the weights as they are; `variant` is part of the names of the weight files, such as `fp16`;
    UNet and VAE weights above `max_shard_bytes` are sharded.
    """
    with suppress(OSError):
        (folder / INDEX).unlink(missing_ok=True)  # until the folder is complete again
    vae.save_pretrained(folder / "vae", dtype=dtype, variant=variant, max_shard_bytes=max_shard_bytes)
    save_unet(unet, folder, dtype=dtype, variant=variant, max_shard_bytes=max_shard_bytes)
    text_encoder.save_pretrained(folder / "text_encoder", folder / "tokenizer", dtype=dtype, variant=variant)
    _write(folder / "scheduler" / "scheduler_config.json", to_json(saved_config(process)))
    _write(folder / INDEX, to_json(model_index(text_encoder, has_experts=isinstance(unet, Experts))))


def begin_model(
    folder: Path,
    *,
    vae: VAE,
    unet: Denoiser,
    text_encoder: TextEncoder,
    frozen: Mapping[str, Tensor],
    process: Process,
) -> None:
    """Write all of a model but `model_index.json` and what is yet to be trained, which checkpoints will hold.

    `frozen` are the weights of the text encoder that are not trained. A finished model in the folder is left alone.
    """
    if (folder / INDEX).is_file():
        return
    from text_encoder.files import begin_model as begin_text_encoder  # importing it loads transformers
    from text_encoder.files import save_tokenizer

    vae.save_pretrained(folder / "vae")
    begin_configs(unet, folder)
    begin_text_encoder(text_encoder.model, folder / "text_encoder", text_encoder.use_attention_mask, frozen)
    save_tokenizer(text_encoder.tokenizer, folder / "tokenizer", text_encoder.max_length)
    _write(folder / "scheduler" / "scheduler_config.json", to_json(saved_config(process)))


def model_index(text_encoder: TextEncoder, *, has_experts: bool = False) -> dict[str, Any]:
    """Return the contents of `model_index.json`, which names the class of each part; see `files.experts`."""
    absent = [None, None]
    return {
        "_class_name": PIPELINE if has_experts else "StableDiffusionPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "feature_extractor": absent,
        "image_encoder": absent,
        "requires_safety_checker": False,
        "safety_checker": absent,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", type(text_encoder.model).__name__],
        "tokenizer": ["transformers", type(text_encoder.tokenizer).__name__],
        "unet": ["latentdiff", "TimestepExperts"] if has_experts else ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def export_model(
    source: str | Path,
    output: Path,
    *,
    single: bool = False,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    max_shard_bytes: int | None = None,
    license: str = "other",
    data: str = "",
    experts_apart: bool = False,
) -> Path:
    """Open a model and write it in another form, with a model card.

    Args:
        source: anything that `LatentPipeline.from_pretrained` opens.
        output: folder, or `.safetensors` file if `single`.
        single: write one file in the original layout, with the card in its header, instead of a diffusers folder.
        dtype: of the written weights.
        variant: part of the names of the weight files, such as `fp16`.
        max_shard_bytes: split UNet and VAE weights that are larger.
        license: of the weights, as the Hub spells it.
        data: what the card says about the training images and their license.
        experts_apart: of a model with experts, write one folder for each; diffusers cannot open them as one.

    Raises:
        LatentDiffError: the source cannot be opened, diffusers lacks its prediction or its attention to earlier steps,
            or the output cannot be written.
    """
    if single and output.suffix != ".safetensors":
        raise LatentDiffError(f"{output}: expected a name ending in .safetensors for a single file")
    if single and (variant or max_shard_bytes is not None):
        raise LatentDiffError("a single file cannot have a variant or shards")
    opened = find_model(source)
    if opened.resolve() in (output.resolve(), *(output / "model").resolve().parents, (output / "model").resolve()):
        raise LatentDiffError(f"{output}: overlaps the model to be exported; choose another output")
    if not single and output.is_dir() and any(output.iterdir()):
        raise LatentDiffError(f"{output}: the folder is not empty; choose another output or delete it")
    parts = open_model(source, device=torch.device("cpu"), dtype=torch.float32)
    experts = experts_to_export(source, parts.unet, apart=experts_apart, single=single)
    scheduler = scheduler_config(parts.process)
    if (history := parts.unet.config.trajectory_attention) > 0:
        raise LatentDiffError(
            f"unet.trajectory_attention={history}: diffusers has no UNet that attends to earlier steps; "
            "only models without can be exported"
        )
    run = opened.parent if (opened.parent / "run.json").is_file() else None
    size = (parts.unet.config.sample_size or 32) * parts.vae.config.downsampling
    encoder = type(getattr(parts.text_encoder, "model", parts.text_encoder)).__name__
    for name, (unet, steps) in experts.items():
        models: dict[str, Any] = {"vae": parts.vae, "unet": unet, "text_encoder": parts.text_encoder}
        counts = {part: sum(parameter.numel() for parameter in model.parameters()) for part, model in models.items()}
        card = model_card(counts, encoder, parts.process, title=output.stem if single else (output / name).name,
                          image_size=size, run=run, progress=parts.progress, license=license, data=data,
                          timesteps=steps)  # fmt: skip
        if single:
            from .single_file import write_single_file

            metadata = {"latentdiff.card": card, "modelspec.license": license}
            write_single_file(output, **models, scheduler=scheduler, metadata=metadata, dtype=dtype)
            return output
        save_model(output / name, **models, process=parts.process, dtype=dtype, variant=variant,
                   max_shard_bytes=max_shard_bytes)  # fmt: skip
        _write(output / name / "README.md", card)
    return output


def experts_to_export(
    source: str | Path, unet: Denoiser, *, apart: bool, single: bool
) -> dict[str, tuple[UNet, range | None]]:
    """Return what to write: subfolders, each with its UNet and the timesteps that this one is for, if not for all.

    Raises LatentDiffError if there are experts that are not wanted apart.
    """
    if not isinstance(unet, Experts):
        if apart:
            raise LatentDiffError(f"{source}: has a single UNet, no experts to write apart")
        return {"": (unet, None)}
    bands = [range(*band) for band in pairwise(unet.edges)]
    if not apart or single:
        raise LatentDiffError(f"{source}: has {len(bands)} experts, each for a band of timesteps, and diffusers would "
                              "draw all steps with the first; --experts-apart writes a folder for each")  # fmt: skip
    return {f"expert_{number}": pair for number, pair in enumerate(zip(unet.members, bands, strict=True))}


def push_folder(folder: Path, name: str, *, token: str | None = None, private: bool = False) -> str:
    """Upload a model folder to the Hugging Face Hub and return its URL.

    Raises:
        LatentDiffError: the upload fails, for example without network or permission.
    """
    from huggingface_hub import HfApi

    with reraise_as(LatentDiffError, f"{name}: cannot be uploaded", Exception):  # the Hub's own, the network's
        api = HfApi(token=token)
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a latentdiff model"))


def _write(path: Path, text: str) -> None:
    with staged(path.parent, path.name) as staging:
        (staging / path.name).write_text(text, encoding="utf-8")
