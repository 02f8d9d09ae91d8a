"""A model's diffusion process, to and from the `scheduler_config.json` of diffusers."""

from collections.abc import Mapping
from typing import Any

import torch

from ..diffusion.process import Prediction, Process
from ..diffusion.samplers import Spacing
from ..diffusion.schedule import Schedule, rescale_to_zero_terminal_snr
from ..errors import LatentDiffError

PREDICTIONS: dict[Prediction, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # ours: diffusers'
SAVED: dict[Prediction, str] = {**PREDICTIONS, "mean": "mean"}  # in model folders; diffusers knows no "mean"
BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
# Schedulers with this forward process, by the `timestep_spacing` that each defaults to.
LEADING = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DDIMInverseScheduler")
LINSPACE = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
            "UniPCMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
            "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler")  # fmt: skip
SPACINGS: dict[str, Spacing] = {**dict.fromkeys(LEADING, "leading"), **dict.fromkeys(LINSPACE, "linspace")}


def scheduler_config(process: Process) -> dict[str, Any]:
    """Return the config of diffusers' DDIMScheduler; raise for the prediction `mean`, which diffusers does not have."""
    if process.prediction not in PREDICTIONS:
        raise LatentDiffError(
            f"diffusion.prediction={process.prediction}: diffusers has no scheduler for it; "
            f"only models that predict {', '.join(PREDICTIONS)} can be exported"
        )
    return saved_config(process)


def saved_config(process: Process) -> dict[str, Any]:
    """Return the config in a model's folder: `scheduler_config`, or with `mean` what diffusers refuses to sample by."""
    schedule, prediction, spacing, offset, final_sigma_zero = process
    values: dict[str, Any] = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.num_timesteps,
        "prediction_type": SAVED[prediction],
        "timestep_spacing": spacing,
        "clip_sample": False,
        "set_alpha_to_one": final_sigma_zero,
        "steps_offset": offset if spacing == "leading" else 1,  # the others ignore it; diffusers overwrites all but 1
    }
    if schedule.name is None:
        return values | {"trained_betas": schedule.betas.tolist()}
    return values | {
        "beta_schedule": BETA_SCHEDULES[schedule.name.name],
        "beta_start": schedule.name.beta_start,
        "beta_end": schedule.name.beta_end,
        "rescale_betas_zero_snr": schedule.name.zero_terminal_snr,
    }


def read_scheduler(
    values: Mapping[str, Any], where: object, predictions: Mapping[Prediction, str] = PREDICTIONS
) -> Process:
    """Return the process that a `scheduler_config.json` describes, with diffusers' defaults; errors name `where`."""
    kind = values.get("_class_name", "DDIMScheduler")
    if not isinstance(kind, str) or kind not in SPACINGS:
        raise LatentDiffError(f"{where}: _class_name {kind!r} is not supported; choose one of {', '.join(SPACINGS)}")

    def choice(key: str, default: str, choices: Mapping[Any, str]) -> Any:
        value = values.get(key, default)
        for ours, theirs in choices.items():
            if value == theirs:
                return ours
        raise LatentDiffError(f"{where}: {key}={value!r} is not supported; choose one of {', '.join(choices.values())}")

    prediction = choice("prediction_type", "epsilon", predictions)
    spacing = choice("timestep_spacing", SPACINGS[kind], {name: name for name in ("leading", "trailing", "linspace")})
    final_sigma_zero = values.get("set_alpha_to_one", kind != "PNDMScheduler")
    offset = values.get("steps_offset", 0)
    if not isinstance(final_sigma_zero, bool) or not isinstance(offset, int) or isinstance(offset, bool) or offset < 0:
        raise LatentDiffError(
            f"{where}: set_alpha_to_one={final_sigma_zero!r}, steps_offset={offset!r}: "
            "expected a boolean and an integer >= 0"
        )
    try:
        schedule = _schedule(values, choice)
    except (LatentDiffError, TypeError, ValueError) as error:
        text = str(error)
        raise LatentDiffError(text if text.startswith(str(where)) else f"{where}: {text}") from None
    return Process(schedule, prediction, spacing, offset if spacing == "leading" else 0, final_sigma_zero)


def check_scheduler(scheduler: Any, process: Process) -> None:
    """Raise unless a diffusers scheduler object matches the model's noise schedule and prediction."""
    if not all(hasattr(scheduler, name) for name in ("set_timesteps", "step", "config", "alphas_cumprod")):
        raise LatentDiffError(f"sampler={scheduler!r:.200}: expected the name of a sampler or a diffusers scheduler")
    kind = type(scheduler).__name__
    advice = f"build it with {kind}.from_config(pipe.scheduler_config)"
    if (found := scheduler.config.get("prediction_type")) != (wanted := scheduler_config(process)["prediction_type"]):
        raise LatentDiffError(f"{kind} has prediction_type {found!r} but the model has {wanted!r}; {advice}")
    for key in ("clip_sample", "thresholding"):  # meant for pixels; latents exceed 1
        if scheduler.config.get(key):
            raise LatentDiffError(f"{kind} has {key}=True, which clips the latents; {advice}")
    levels = scheduler.alphas_cumprod.double().cpu()
    if levels.shape != process.schedule.alpha_bar.shape or not torch.allclose(
        levels, process.schedule.alpha_bar, atol=1e-4
    ):
        raise LatentDiffError(f"{kind} has different noise levels from the model; {advice}")


def _schedule(values: Mapping[str, Any], choice: Any) -> Schedule:
    if values.get("trained_betas") is not None:
        betas = torch.tensor(values["trained_betas"], dtype=torch.float64)
        return Schedule(rescale_to_zero_terminal_snr(betas) if values.get("rescale_betas_zero_snr") else betas)
    name = choice("beta_schedule", "linear", BETA_SCHEDULES)
    steps = values.get("num_train_timesteps", 1000)
    if isinstance(steps, int) and steps > 1_000_000:
        raise LatentDiffError(f"num_train_timesteps={steps}: expected at most 1000000")
    ends = {} if name == "cosine" else {key: values.get(key, default)
                                        for key, default in (("beta_start", 1e-4), ("beta_end", 0.02))}  # fmt: skip
    zero = bool(values.get("rescale_betas_zero_snr", False))
    return Schedule.named(name, steps, **ends, zero_terminal_snr=zero)
