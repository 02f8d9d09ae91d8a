"""What a continuation must share with the run it continues: the settings that decide what a step computes."""

from collections.abc import Mapping
from typing import Any

from .launch import Launch

# Settings that may change between a run and its continuation.
RESUMABLE_KEYS = {"steps", "log_every", "checkpoint_every", "keep_checkpoints", "validate_every", "validate_first",
                  "max_skipped", "compile", "micro_batch_size", "gradient_checkpointing", "attention",
                  "max_broken"}  # fmt: skip


def fingerprint(run: Launch, *sections: str) -> dict[str, Any]:
    """Seed, data, precision and some sections of the config, without what may change."""
    values = run.config.model_dump(mode="json", include={"seed", "data", *sections})
    for section in values.values():
        if isinstance(section, dict):
            resumable = RESUMABLE_KEYS - ({"steps"} if section.get("lr_schedule") == "cosine" else set())
            for name in resumable & section.keys():
                del section[name]
    return {**values, "precision": run.precision}


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The dotted name of the first setting that differs, and its two values; None where none does.

    A setting that an older version did not know counts as None; one that is not recorded now is ignored.
    """
    for name, value in now.items():
        former = before.get(name)
        if isinstance(value, dict) and isinstance(former, dict):
            if (found := first_difference(former, value)) is not None:
                return f"{name}.{found[0]}", *found[1:]
        elif former != value:
            return name, former, value
    return None
