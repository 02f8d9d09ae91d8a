"""What a budget buys: latentdiff/training/budget.py's arithmetic, on estimated times instead of measured ones."""

import math
import sys
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path

from ..assets import BUILTIN, pictures_folder
from ..config import Config
from ..data.listing import SHARDS
from ..data.sources import open_source
from ..sections import TrainSection, TrainVAESection
from ..sections.values import duration
from ..training.budget import AIM, DISK_SPEED, LEAVING, MIN_STEPS, OVERHEAD, PARTS, RESERVE, format_duration
from ..training.timetable import DECAY, Decision, Timetable
from .report import Purchase, Stage

NUM_PROMPTS = 16  # held-out captions that are sampled at a validation if the config has no prompts


@dataclass(frozen=True)
class Part:
    """A stage's part of the budget, and what comes out of it besides steps; all in seconds, most of them estimated."""

    begin: float  # after the launch
    limit: float  # when the stage must have ended, likewise
    growth: float  # of this part, per second that is added to the budget
    validation: float
    checkpoint: float
    snapshots: float = 0.0  # all of them
    finishing: float = 0.0
    is_last: bool = False  # the stage before may be a little late

    @property
    def after(self) -> float:
        """What follows the last step; writing a model takes about as long as a checkpoint."""
        return self.validation + 3 * self.checkpoint + self.finishing

    @property
    def stretch(self) -> float:
        """Factor for the validations, checkpoints and snapshots between the steps."""
        length = max(1.0, self.limit - self.begin)
        return 1 + min(OVERHEAD, PARTS * (self.validation + self.checkpoint) / length) + self.snapshots / length

    @property
    def for_steps(self) -> float:
        """What is left for steps, validations and checkpoints; negative if the rest takes longer than there is."""
        tail = RESERVE * self.after + LEAVING if self.is_last else self.after
        return AIM * self.limit - self.begin - tail


def count_pictures(config: Config) -> int | None:
    """Return the number of training pictures of a shipped set or a folder, or None if counting them takes long."""
    source = config.data.source
    folder = Path(pictures_folder(source))
    if not folder.is_dir():
        return None
    if not source.startswith(BUILTIN) and any(path.suffix in SHARDS for path in folder.rglob("*")):
        return None
    return len(open_source(config.data)[0])


def steps_without_discriminator(section: TrainSection, steps: int, *, has_budget: bool) -> int:
    """Return how many of the steps come before the discriminator's first one."""
    if not isinstance(section, TrainVAESection) or not section.adversarial_weight:
        return steps
    timetable = Timetable(section, has_budget=has_budget)
    timetable.decisions = [Decision("", 0, *_decay(steps), budget=0.0)]
    return max(0, min(steps, timetable.first_step(section.adversarial_start) - 1))


def spend(
    config: Config, vae: Stage | None, latent: Stage, sample: Stage, *, set_size: int, finishing: float, encoding: float
) -> tuple[Stage | None, Stage]:  # fmt: skip
    """Return VAE and latent training with as many steps as fit into the budget.

    Args:
        config: of the run, with a budget.
        vae: VAE training, None if the VAE is pretrained.
        latent: latent training.
        sample: sampling one picture.
        set_size: number of training pictures.
        finishing: seconds from the last step of VAE training to the finished VAE.
        encoding: seconds from then, or from the launch, to the complete caches.
    """
    budget, settings = duration(config.budget), config.validation
    share = config.budget_share if vae else 0.0
    held_out, begin = min(settings.num_pictures, math.ceil(config.data.validation_share * set_size)), encoding
    if vae:
        validation = held_out * vae.forward_flops * _pace(vae)
        part = Part(0.0, share * budget, share, validation, _checkpoint(vae), finishing=finishing)
        vae = _buy(config, vae, config.train_vae, part, set_size)
        begin += vae.purchase.end if vae.purchase else 0.0
    passes = held_out * settings.timestep_bands * (2 + config.train_latent.keep_best)
    prompts = len(settings.prompts) or min(NUM_PROMPTS, held_out)
    validation = passes * latent.forward_flops * _pace(latent) + prompts * sample.seconds
    snapshots = config.train_latent.ema_snapshots * 8 * latent.trained / DISK_SPEED
    part = Part(begin, budget, 1 - share, validation, _checkpoint(latent), snapshots, is_last=True)
    return vae, _buy(config, latent, config.train_latent, part, set_size)


def _buy(config: Config, stage: Stage, section: TrainSection, part: Part, set_size: int) -> Stage:
    """Return a stage with as many steps as fit into its part of the budget."""

    def flops(steps: int) -> int:
        early = steps_without_discriminator(section, steps, has_budget=True)
        return section.batch_size * (early * stage.early_flops + (steps - early) * stage.step_flops)

    def seconds(steps: int) -> float:
        return flops(steps) * _pace(stage) * part.stretch

    most, first = section.max_steps or sys.maxsize, part.validation * section.validate_first
    available = part.for_steps - first
    least_per_step = section.batch_size * min(stage.early_flops, stage.step_flops) * _pace(stage) * part.stretch
    bound = min(most, 1 + int(max(0.0, available) / least_per_step))
    steps = max(0, bisect_right(range(bound + 1), available, key=seconds) - 1)
    fewest, budget, length = min(MIN_STEPS, most), duration(config.budget), max(0.0, part.limit - part.begin)
    missing = (seconds(fewest) - available) / (AIM * part.growth) if steps < fewest else 0.0
    early = steps_without_discriminator(section, steps, has_budget=True)
    purchase = Purchase(
        budget=str(config.budget),
        share=length / budget,
        seconds=length,
        end=part.begin + first + seconds(steps) + part.after,
        steps=steps,
        is_bounded=steps == most,
        fewest=fewest,
        batch_size=section.batch_size,
        set_size=set_size,
        warmup_steps=round(section.warmup_steps * steps / section.steps),
        discriminator_start=early + 1 if early < steps else None,
        decay_start=_decay(steps)[0] + 1,
        enough=format_duration(budget + missing) if missing else None,
    )
    return replace(stage, pictures=steps * section.batch_size, total_flops=flops(steps),
                   seconds=flops(steps) * _pace(stage), purchase=purchase)  # fmt: skip


def _decay(steps: int) -> tuple[int, int]:
    """The number of steps before the learning rate falls, and of those with a falling one."""
    falling = min(steps, math.ceil(DECAY * steps))
    return steps - falling, falling


def _pace(stage: Stage) -> float:
    """Seconds per FLOP, with all devices at work."""
    return stage.seconds / stage.total_flops


def _checkpoint(stage: Stage) -> float:
    """Seconds to write a checkpoint."""
    return stage.checkpoint / DISK_SPEED
