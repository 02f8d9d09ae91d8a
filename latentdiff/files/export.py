"""Writing a model for others: folder or single file, card, upload."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import LatentDiffError
from .card import model_card
from .model_folder import save_model
from .open import find_model, open_model
from .scheduler import scheduler_config
from .single_file import write_single_file


def export_model(
    source: str | Path,
    output: Path,
    *,
    single: bool = False,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    max_shard_bytes: int | None = None,
    licence: str = "other",
    data: str = "",
) -> Path:
    """Open a model and write it again, with a card.

    Args:
        source: anything that `LatentPipeline.from_pretrained` opens.
        output: folder, or file.
        single: one file in the original layout instead of diffusers' folder; the card is part of its header.
        dtype: of the weights.
        variant: for the names of the weight files.
        max_shard_bytes: size of a weight file above which it is split.
        licence: of the weights.
        data: what the card says of the pictures and their licence.

    Raises:
        LatentDiffError: the source cannot be opened, or the output not be written.
    """
    if single and output.suffix != ".safetensors":
        raise LatentDiffError(f"{output}: a single file's name ends in .safetensors")
    if single and (variant or max_shard_bytes):
        raise LatentDiffError("a single file has no variant and no shards")
    opened = find_model(source)
    if opened.resolve() in (output.resolve(), *(output / "model").resolve().parents, (output / "model").resolve()):
        raise LatentDiffError(f"{output}: the model itself lies there; choose another output")
    if not single and output.is_dir() and any(output.iterdir()):
        raise LatentDiffError(f"{output}: is not empty; choose another output, or delete it")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise LatentDiffError(f"shards of {max_shard_bytes} bytes: expected at least 1")
    parts = open_model(source, device=torch.device("cpu"), dtype=torch.float32)
    models = {"vae": parts.vae, "unet": parts.unet, "text_encoder": parts.text_encoder}
    size = (parts.unet.config.sample_size or 32) * parts.vae.config.downsampling
    run = opened.parent if (opened.parent / "run.json").is_file() else None
    card = model_card(
        models,
        parts.process,
        title=output.stem if single else output.name,
        image_size=size,
        run=run,
        licence=licence,
        data=data,
    )
    if single:
        facts = {"latentdiff.card": card, "modelspec.license": licence}
        output.parent.mkdir(parents=True, exist_ok=True)
        write_single_file(output, vae=parts.vae, unet=parts.unet, text_encoder=parts.text_encoder,
                          scheduler=scheduler_config(parts.process), facts=facts, dtype=dtype)  # fmt: skip
        return output
    save_model(output, vae=parts.vae, unet=parts.unet, text_encoder=parts.text_encoder, process=parts.process,
               dtype=dtype, variant=variant, max_shard_bytes=max_shard_bytes)  # fmt: skip
    try:
        (output / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise LatentDiffError(f"{output / 'README.md'}: cannot be written ({error})") from None
    return output


def push_folder(folder: Path, name: str, *, token: str | None = None, private: bool = False) -> str:
    """Upload a model's folder to the Hugging Face hub; returns its address.

    Raises:
        LatentDiffError: no network, no permission, or no such name.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a latentdiff model"))
    except Exception as error:  # the hub's own, the network's: all mean that it did not work
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LatentDiffError(f"{name}: cannot be uploaded ({reason})") from None
