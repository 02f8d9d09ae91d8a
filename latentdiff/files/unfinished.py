"""A training run whose model is not finished: opening its newest checkpoint as a model, or saying what is missing.

When latent training begins, it writes all of `<run>/model/` but what is trained (`export.begin_model`). The averaged
weights of the rest are in every checkpoint. A training may be going on in the run, so nothing here writes into it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from text_encoder import TextEncoder
from unet import Denoiser, UNet, UNetConfig
from unet.experts import new_denoiser
from vae import VAE

from ..assets import INDEX, part_folder
from ..diffusion.process import Process
from ..errors import LatentDiffError
from ..training.checkpoint import Checkpoint, newest_checkpoint
from ..training.manifest import DamagedCheckpoint
from .experts import read_edges
from .scheduler import SAVED, read_scheduler
from .tensors import CONFIG, Stored, check_tensors, open_file, read_json

RECORD = "run.json"  # every run has one
SCHEDULER, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
BEGUN = (f"vae/{CONFIG}", f"unet/{CONFIG}", f"text_encoder/{CONFIG}", TOKENIZER, SCHEDULER)
TRIES = 3  # to read a checkpoint before a training that goes on deletes it
AGAIN = "give the training command again to go on"


class Average(NamedTuple):
    """The averaged weights in the newest intact checkpoint of a run's latent training."""

    file: Path
    tensors: dict[str, Stored]  # open, so that they can be read even if the training deletes the file
    progress: str  # such as "step 300 of 2000"
    damages: list[str]  # what is wrong with newer checkpoints


def unfinished_run(model: Path) -> Path | None:
    """Return the run whose unfinished `model` folder this is, or None if it is no such folder."""
    run = model.absolute().parent
    is_one = model.absolute().name == "model" and (run / RECORD).is_file() and not (model / INDEX).is_file()
    return (model.parent if model.name else run) if is_one else None


def newest_average(run: Path) -> Average:
    """Find the averaged weights of an unfinished run; raise LatentDiffError with what is missing if there are none."""
    for _ in range(TRIES):
        checkpoint, damages = _newest_checkpoint(run / "train_latent")
        if checkpoint is None:
            break
        file = checkpoint.path / "model-ema.safetensors"
        try:
            return Average(file, open_file(file)[0], _progress(checkpoint), damages)
        except LatentDiffError:
            if file.exists():
                raise
    if damages:
        raise LatentDiffError(f"{run}: {damages[0]}; give the training command again to start this stage over")
    has_vae = (run / "vae" / "done.json").is_file()
    if has_vae or ((run / "model" / "vae" / CONFIG).is_file() and not (run / "train_vae").is_dir()):
        raise LatentDiffError(f"{run}: its VAE is finished, but latent training has no checkpoint yet; {AGAIN}")
    raise LatentDiffError(f"{run}: {_vae_progress(run)}; {AGAIN}")


def open_unfinished(
    run: Path, *, device: torch.device, dtype: torch.dtype, variant: str | None = None
) -> tuple[VAE, Denoiser, TextEncoder, Process, Average]:
    """Open the newest checkpoint of a run, in evaluation mode, with the averages as weights; also say which it is."""
    average, model = newest_average(run), run / "model"
    if missing := [name for name in BEGUN if not (model / name).is_file()]:
        raise LatentDiffError(f"{model / missing[0]}: no such file, as in runs of older versions; "
                              "give the training command again, which writes it")  # fmt: skip
    process = read_scheduler(read_json(model / SCHEDULER, ""), model / SCHEDULER, SAVED)
    vae = VAE.from_pretrained(model / "vae", device=device, dtype=dtype, variant=variant)
    unet, encoder = _read_unet(model / "unet", average, dtype), _read_text_encoder(model, average, dtype)
    return vae, unet.to(device), encoder.to(device), process, average


def find_part(pretrained: str, part: str, setting: str | None = None) -> str:
    """Return the folder of one part of a model, named by a setting, `<part>.pretrained`; a Hub name stays as it is.

    The setting may be a part's own folder, a model, the output of a training run, or `builtin:NAME`. Raises
    LatentDiffError if that part is still being trained.
    """
    named, where = part_folder(pretrained, part), f"{setting or f'{part}.pretrained'}={pretrained}"
    folder = unfinished_run(Path(named)) or Path(named)
    if not folder.is_dir() and not (folder.absolute().parent / RECORD).is_file():
        return named  # on the Hub, or nowhere, which what opens it says
    found = folder / _place(folder, part)
    home = found.absolute().parent
    is_of_run = part == found.absolute().name == "vae" and (home / RECORD).is_file()
    if is_of_run and not (found / "done.json").is_file() and ((home / "train_vae").is_dir() or not found.is_dir()):
        raise LatentDiffError(f"{where}: {_vae_progress(home)}; {AGAIN}")
    if part != "vae" and (run := unfinished_run(home)) is not None:
        raise LatentDiffError(f"{where}: the model of this run is not finished; `latentdiff export {run} FOLDER` makes "
                              "one of its newest checkpoint, and that FOLDER can be given here")  # fmt: skip
    if not found.is_dir():
        raise LatentDiffError(f"{where}: {found}: no such folder")
    return str(found)


def raise_if_alone(folder: Path) -> None:
    """Raise LatentDiffError if the folder is a VAE or UNet alone rather than a model."""
    kinds = {"AutoencoderKL": "VAE", "UNet2DConditionModel": "UNet"}
    config = read_json(folder / CONFIG, "") if (folder / CONFIG).is_file() else {}
    if kind := kinds.get(str(config.get("_class_name"))):
        home = folder.absolute().parent
        whole = next((str(home) for name in (RECORD, INDEX) if (home / name).is_file()), f"a folder with {INDEX}")
        raise LatentDiffError(f"{folder}: a {kind} alone, which is one part of a model; give {whole} instead")


def _place(folder: Path, part: str) -> Path:
    """Where a part lies in a model or a run; in any other folder, which should be the part itself, `.`."""
    if (folder / INDEX).is_file():
        return Path(part)
    if not (folder / RECORD).is_file():
        return Path()
    inside = Path("model", part)
    uses_another = (folder / inside).is_dir() and not any((folder / name).is_dir() for name in ("vae", "train_vae"))
    return Path("vae") if part == "vae" and not uses_another else inside


def _progress(checkpoint: Checkpoint) -> str:
    """Say how far training had come; checkpoints of older versions do not know the number of steps."""
    steps = checkpoint.metadata.get("steps")
    return f"step {checkpoint.step} of {steps}" if isinstance(steps, int) else f"step {checkpoint.step}"


def _vae_progress(run: Path) -> str:
    """Say how far a run has come whose VAE is not finished."""
    checkpoint, damages = _newest_checkpoint(run / "train_vae")
    if checkpoint is not None:
        return f"its VAE is still being trained: {_progress(checkpoint)}"
    if damages:
        return f"its VAE is still being trained, and {damages[0]}"
    return "nothing has been trained yet, as it has no checkpoint"


def _newest_checkpoint(stage: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest intact checkpoint of a stage, and what is wrong with newer ones."""
    for _ in range(TRIES):
        damages: list[str] = []
        try:
            checkpoint = newest_checkpoint(stage / "checkpoints", damages.append)
        except DamagedCheckpoint:  # deleted after it was verified
            continue
        if checkpoint is not None or not damages:
            return checkpoint, damages
    return None, damages


def _part(tensors: Mapping[str, Stored], prefix: str) -> dict[str, Stored]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _read_unet(folder: Path, average: Average, dtype: torch.dtype) -> Denoiser:
    tensors, values = _part(average.tensors, "unet."), UNet.files.read_config(folder)
    try:
        with torch.device("meta"):  # shapes only, no memory
            unet = new_denoiser(UNetConfig.from_diffusers(values), read_edges(folder.parent))
    except LatentDiffError as error:
        raise LatentDiffError(f"{folder / CONFIG}: {error}") from None
    expected = {name: [list(tensor.shape)] for name, tensor in unet.state_dict().items()}
    check_tensors(average.file, tensors, expected, UNet.files.model)
    unet.load_state_dict({name: tensors[name].read(dtype) for name in expected}, assign=True)
    return unet.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def _read_text_encoder(model: Path, average: Average, dtype: torch.dtype) -> TextEncoder:
    from text_encoder.files import load_model, load_tokenizer  # importing it loads transformers

    trained = _part(average.tensors, "text_encoder.model.")
    loaded, kind = load_model(model / "text_encoder", dtype, trained=trained)
    tokenizer, _ = load_tokenizer(model / "text_encoder", model / "tokenizer", kind)
    uses_mask = getattr(loaded.config, "use_attention_mask", kind == "bert") is True
    return TextEncoder(loaded, tokenizer, tokenizer.model_max_length, use_attention_mask=uses_mask).eval()
