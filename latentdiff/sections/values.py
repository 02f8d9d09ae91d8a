"""The kinds of values that settings have, and how each is read."""

import os
import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field


def number(value: object) -> object:
    """Return the number that a text spells, as YAML reads 1e-4 as a text; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def duration(text: object) -> float:
    """Return the seconds of a time such as `90s`, `10m` or `1h30m`; raise ValueError for anything else."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", text) if isinstance(text, str) else []
    seconds = sum(float(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in parts)
    if not seconds or "".join(map("".join, parts)) != text:
        raise ValueError("a time such as 90s, 10m or 1h30m")
    return seconds


def _duration(text: object) -> object:
    duration(text)
    return text


def _expanded(path: str) -> str:
    """Replace a leading `~` by the home folder, in the only place where settings with paths are read."""
    return os.path.expanduser(path)


PathText = Annotated[str, AfterValidator(_expanded)]
Duration = Annotated[str, BeforeValidator(_duration)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, BeforeValidator(number), Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, BeforeValidator(number), Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(number), Field(ge=0, le=1)]
Decay = Annotated[float, BeforeValidator(number), Field(ge=0, lt=1)]
Level = Annotated[int, Field(ge=0, le=255)]
Color = tuple[Level, Level, Level]
