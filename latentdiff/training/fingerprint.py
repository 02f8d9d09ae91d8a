"""The fingerprint of a run: the settings that decide what a step computes and may not change on resuming."""

from collections.abc import Mapping
from typing import Any

from .launch import Launch

# Settings that may change when a run is resumed.
RESUMABLE_KEYS = {"steps", "max_steps", "log_every", "checkpoint_every", "keep_checkpoints", "keep_best",
                  "ema_snapshots", "evaluate_every", "validate_every", "validate_first", "max_skipped", "max_spike",
                  "compile", "cuda_graph", "micro_batch_size", "gradient_checkpointing", "attention",
                  "max_broken"}  # fmt: skip


def fingerprint(run: Launch, *sections: str) -> dict[str, Any]:
    """Return seed, data, precision and some sections of the config, without the settings that may change."""
    values = run.config.model_dump(mode="json", include={"seed", "data", *sections})
    for section in values.values():
        if isinstance(section, dict):
            resumable = RESUMABLE_KEYS - ({"steps"} if section.get("lr_schedule") == "cosine" else set())
            for name in resumable & section.keys():
                del section[name]
            if section.get("trajectory_attention") == 0:  # as in runs of versions that did not have it
                del section["trajectory_attention"]
    return {**values, "precision": run.precision}


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the dotted name of the first setting of `now` that differs, with its old and new value, or None.

    A setting missing from `before`, as in a record by an older version, counts as None.
    """
    for name, value in now.items():
        previous = before.get(name)
        if isinstance(value, dict) and isinstance(previous, dict):
            if (found := first_difference(previous, value)) is not None:
                return f"{name}.{found[0]}", *found[1:]
        elif previous != value:
            return name, previous, value
    return None
