"""The exception for user errors, checks that raise it, and the conversion of other exceptions to it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from math import prod
from typing import Any

MAX_LAYERS = 128  # levels x layers x transformers of a model config; Stable Diffusion XL has 60


class LatentDiffError(ValueError):
    """A setting, file or input that cannot be used; the message names it and says what is allowed."""


class UnfinishedModelWarning(UserWarning):
    """Warning that a model is the newest checkpoint of a training that is not finished; the message says its step."""


def check_choice(what: str, name: str, allowed: Iterable[str]) -> None:
    """Raise LatentDiffError unless the name is allowed; the message suggests the closest one that is."""
    allowed = list(allowed)
    if name not in allowed:
        raise LatentDiffError(f"unknown {what} {name!r}: choose one of {', '.join(allowed)}{nearest(name, allowed)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a "did you mean" clause with the known name closest to `name`, or an empty string if none is close."""
    near = get_close_matches(str(name), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_positive_int(error: type[LatentDiffError], name: str, value: object, at_most: int = 1_000_000) -> None:
    """Raise unless the value is an integer from 1 to `at_most`, so that no damaged config can exhaust memory."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= at_most:
        raise error(f"{name}={value!r} is not supported; expected an integer from 1 to {at_most}")


def check_levels(
    error: type[LatentDiffError], get: Callable[[str], Any], down: tuple[str, str], up: tuple[str, str], *depths: str
) -> tuple[int, ...]:
    """Return the levels with attention in a diffusers config, which lists block types for the way down and up.

    `down` and `up` are the supported block types, without and with attention; `depths` are the keys whose product is
    the number of layers per level. Raises on lists that are malformed or inconsistent, and on too many layers in total.
    """
    for key in ("down_block_types", "up_block_types", "block_out_channels"):
        if not isinstance(get(key), list | tuple):
            raise error(f"{key}={get(key)!r} is not supported; expected a list with one entry per level")
    for key, types in (("down_block_types", down), ("up_block_types", up)):
        if wrong := [name for name in get(key) if name not in types]:
            raise error(f"{key} has {wrong[0]!r}, which is not supported; only {types[0]!r} and {types[1]!r} are")
    attention = [name == down[1] for name in get("down_block_types")]
    if attention != [name == up[1] for name in get("up_block_types")][::-1]:
        raise error(f"up_block_types={get('up_block_types')!r} does not mirror down_block_types")
    if len(attention) != (levels := len(get("block_out_channels"))):
        raise error(f"{len(attention)} down_block_types for {levels} block_out_channels")
    for key in depths:
        check_positive_int(error, key, get(key), at_most=100)
    if (layers := levels * prod(map(get, depths))) > MAX_LAYERS:
        raise error(f"levels x {' x '.join(depths)} is {layers}; expected at most {MAX_LAYERS}")
    return tuple(level for level, has in enumerate(attention) if has)


@contextmanager
def reraise_as(error: type[LatentDiffError], message: str = "", *library_errors: type[Exception]) -> Iterator[None]:
    """Convert every LatentDiffError to `error`, and `library_errors` to `error` with `message` in front."""
    try:
        yield
    except LatentDiffError as ours:
        if isinstance(ours, error):
            raise
        raise error(str(ours)) from None
    except library_errors as theirs:
        words = str(theirs).split() or [type(theirs).__name__]
        raise error(f"{message} ({one_line(' '.join(words))})") from theirs


def one_line(value: object) -> str:
    """Return text from an untrusted file as one printable line of limited length."""
    text = str(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 300 else f"{text[:300]}…"


def several(names: Iterable[str], most: int = 3) -> str:
    """Return the first few of the sorted names, separated by commas."""
    ordered = sorted(names)
    return ", ".join(map(one_line, ordered[:most])) + (", …" if len(ordered) > most else "")


def raise_for_tensors(where: object, problem: str, names: Iterable[str]) -> None:
    """If any tensors have a problem, raise LatentDiffError with their number and first few names."""
    if names := set(names):
        count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
        raise LatentDiffError(f"{where}: {problem} {count}: {several(names)}")
