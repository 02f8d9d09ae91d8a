"""`latentdiff ema`: averages of any length from the snapshots of a run, measured if there is a choice, and saved."""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..assets import INDEX
from ..config import Config
from ..errors import LatentDiffError, UnfinishedModelWarning, raise_for_tensors, reraise_as, several
from ..evaluation.evaluate import evaluate
from ..files.export import save_model
from ..files.open import open_model
from ..files.tensors import open_file
from ..sampling.parts import ModelParts
from ..sampling.settings import SamplingSettings
from ..sections import DataConfig
from .checkpoint import SUFFIX, step_folders, verify
from .done import ORIGIN
from .latent import submodule_state
from .launch import launched, locked
from .manifest import DamagedCheckpoint, read_metadata
from .parallel import evaluation_mode
from .profiles import MOST_MISSED, Mixture, Profile, closest_mixtures, reachable
from .stages import new_latent_training, open_vae

Average = dict[str, Tensor]  # by parameter name


@dataclass(frozen=True)
class Series:
    """The intact snapshots of a run: profiles of the averages in them, and their files."""

    folder: Path
    step: int  # of the last one
    profiles: list[Profile]
    files: list[Path]  # one for each profile
    left_out: dict[str, str]  # the other snapshots, and why they cannot be used

    def mixture(self, sigma_rel: float) -> Mixture:
        """Return the mixture for a length at the last step; raise LatentDiffError if it misses that by too much."""
        (found,) = closest_mixtures(self.profiles, [Profile(self.step, sigma_rel)])
        if found.missed > MOST_MISSED:
            reach = reachable(self.profiles, self.step)
            can = f"they reach {reach[0]:.3f} to {reach[1]:.3f}" if reach else "they reach no length"
            without = f"; left out: {'; '.join(self.reasons())}" if self.left_out else ""
            raise LatentDiffError(f"sigma_rel={sigma_rel:g}: the snapshots in {self.folder} miss the profile of this "
                                  f"average by {found.missed:.1%}, and {MOST_MISSED:.0%} is allowed; {can} at step "
                                  f"{self.step}{without}")  # fmt: skip
        return found

    def reasons(self) -> Iterator[str]:
        """Yield one line for each snapshot that is left out."""
        return (f"{name}: {reason}" for name, reason in sorted(self.left_out.items()))

    def average(self, mixture: Mixture) -> Average:
        """Add up the averages of the snapshots, each tensor in float64; the result is float32."""
        opened = [(open_file(path)[0], weight) for path, weight in zip(self.files, mixture.weights, strict=True)]
        names = tqdm(opened[0][0], desc="averaging", unit=" tensors", leave=False, disable=None)
        return {name: sum((tensors[name].read(torch.float64) * weight for tensors, weight in opened),
                          torch.zeros((), dtype=torch.float64)).float()
                for name in names}  # fmt: skip


def read_series(run: Path) -> Series:
    """Verify the snapshots of a run; raise LatentDiffError if there are none."""
    folder, stage = run / "train_latent" / "snapshots", run / "train_latent"
    left_out = {f"step-{step:08d}": "is missing" for step in _recorded(stage / "checkpoints")}
    intact: dict[int, Path] = {}
    for step, path in tqdm(step_folders(folder), desc="verifying", unit=" snapshots", leave=False, disable=None):
        if step not in intact and (damage := verify(path)) is None:
            intact[step] = path
        elif step not in intact:
            left_out[f"step-{step:08d}"] = str(damage)
    facts = {step: read_metadata(path) for step, path in sorted(intact.items())}
    keys = [metadata["key"] for metadata in facts.values()]
    for step, metadata in facts.items():
        left_out.pop(f"step-{step:08d}", None)
        if metadata["key"] != keys[-1]:
            left_out[f"step-{step:08d}"] = "belongs to another training"
    files = {Profile(step, sigma_rel): intact[step] / f"{name}{SUFFIX}" for step, metadata in facts.items()
             if metadata["key"] == keys[-1] for name, sigma_rel in metadata["sigma_rel"].items()}  # fmt: skip
    if not files:
        why = f"no intact one of {len(left_out)}: {several(left_out)}" if left_out else "no snapshots"
        raise LatentDiffError(f"{folder}: has {why}; training takes them with train_latent.ema_snapshots=24")
    last = max(*facts, *(int(name.removeprefix("step-")) for name in left_out), 0)
    return Series(folder, last, list(files), list(files.values()), left_out)


def _recorded(checkpoints: Path) -> list[int]:
    """The steps with a snapshot by the newest checkpoint; none if the checkpoints have been deleted."""
    for _, path in step_folders(checkpoints):
        try:
            return list(read_metadata(path).get("snapshots", []))
        except DamagedCheckpoint:
            continue
    return []


def validation_losses(config: Config, averages: Iterable[Average]) -> Iterator[dict[str, float]]:
    """Yield the held-out losses of each average, as training computes them: without captions, and with."""
    with launched(config, None, record=False) as run:  # this is no training
        task = new_latent_training(run, open_vae(run))
        parameters = {name: parameter.detach() for name, parameter in task.state.parameters.items()}
        for average in averages:
            for name, parameter in parameters.items():
                parameter.copy_(average[name])
            with evaluation_mode(task.inner):
                yield {"loss without captions": task.held_out_loss(task.uncaptioned)[""],
                       "loss": task.held_out_loss(task.captioned)[""]}  # fmt: skip


def fidelities(
    pipe: ModelParts, data: DataConfig, style: str, averages: Iterable[Average], say: Callable[[str], None]
) -> Iterator[dict[str, float]]:
    """Yield how often the samples of each average show the concept asked for, as `latentdiff evaluate` measures it."""
    for average in averages:
        put_into(pipe.unet, pipe.text_encoder.model, average)
        concepts = evaluate(pipe, data, SamplingSettings(num_images=2, seed=0), style=style, say=say).concepts
        if concepts is None:
            raise LatentDiffError(f"data.source={data.source}: all pictures show the same concept; --pick validation "
                                  "does not depend on that")  # fmt: skip
        yield {f"right concept by {each.features}": each.top1 for each in concepts.agreements}


def put_into(unet: nn.Module, encoder: nn.Module, average: Average) -> None:
    """Copy an average into the models that were trained; what was frozen stays."""
    with reraise_as(LatentDiffError, "the snapshots are not of this model", RuntimeError):
        unet.load_state_dict(submodule_state("unet.", average))
        found = encoder.load_state_dict(submodule_state("text_encoder.model.", average), strict=False)
    raise_for_tensors("text_encoder", "not part of this model:", found.unexpected_keys)


def check_output(run: Path, output: Path | None, *, overwrite: bool) -> Path:
    """Return the folder to write to; raise LatentDiffError if something would be lost there."""
    folder = output or run / "model"
    if overwrite and (folder / INDEX).is_file():  # a model; other folders are never replaced
        if folder.resolve() == (run / "model").resolve() and not (folder / "done.json").is_file():
            raise LatentDiffError(f"{folder}: the training of this run is not finished; give --output FOLDER")
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        other = "; --overwrite replaces it" if (folder / INDEX).is_file() else ""
        raise LatentDiffError(f"{folder}: is not empty; give another --output FOLDER{other}")
    return folder


def write_average(run: Path, series: Series, sigma_rel: float, figures: dict[str, float], output: Path) -> None:
    """Write the run's model with the average of a length, and `ema.json`, which says what it was computed from."""
    mixture = series.mixture(sigma_rel)
    average = series.average(mixture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnfinishedModelWarning)  # only what was not trained is used
        parts = open_model(run, device=torch.device("cpu"), dtype=torch.float32)
    put_into(parts.unet, parts.text_encoder.model, average)
    record = {"sigma_rel": sigma_rel, "step": series.step, "profile_missed": mixture.missed, "figures": figures,
              "snapshots": sorted({profile.step for profile in series.profiles})}  # fmt: skip
    with locked(run):
        save_model(output, vae=parts.vae, unet=parts.unet, text_encoder=parts.text_encoder, process=parts.process)
        with reraise_as(LatentDiffError, f"{output / ORIGIN}: cannot be written", OSError):
            (output / ORIGIN).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
