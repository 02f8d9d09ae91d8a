"""The one exception of this package for a user's mistake, what turns others into it, and checks of a value."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from math import prod
from typing import Any

MAX_LAYERS = 128  # levels x layers x transformers in a config that is read; Stable Diffusion XL has 60


class LatentDiffError(ValueError):
    """A setting, file or input that cannot be used; the message names it and says what is allowed."""


def check_choice(what: str, name: str, allowed: Iterable[str]) -> None:
    """Refuse a name that is not in the list, with the nearest one that is.

    Raises:
        LatentDiffError: `name` is not allowed.
    """
    allowed = list(allowed)
    if name not in allowed:
        raise LatentDiffError(f"unknown {what} {name!r}: choose one of {', '.join(allowed)}{nearest(name, allowed)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message: the known name that was probably meant, if one is near."""
    near = get_close_matches(str(name), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_whole(error: type[LatentDiffError], name: str, value: object, at_most: int = 1_000_000) -> None:
    """Refuse what is no whole number from 1 up. The bound keeps a damaged file from building layers until memory ends.

    Raises:
        LatentDiffError: of the kind given.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= at_most:
        raise error(f"{name}={value!r} is not supported; it is a whole number from 1 to {at_most}")


def check_levels(
    error: type[LatentDiffError], get: Callable[[str], Any], down: tuple[str, str], up: tuple[str, str], *depths: str
) -> tuple[int, ...]:
    """The levels with attention in a config of diffusers, which names a type of block for each, down and mirrored up.

    Args:
        error: what is raised.
        get: the value of a key.
        down: types of blocks on the way down, without and with attention.
        up: likewise, on the way up.
        depths: keys of numbers that multiply: how many layers a level has.

    Raises:
        LatentDiffError: of the kind given; a list is none, has another type, or does not fit the others; or it would
            take minutes to build all layers, though each number is in bounds.
    """
    for key in ("down_block_types", "up_block_types", "block_out_channels"):
        if not isinstance(get(key), list | tuple):
            raise error(f"{key}={get(key)!r} is not supported; it is a list with one entry a level")
    for key, types in (("down_block_types", down), ("up_block_types", up)):
        if wrong := [name for name in get(key) if name not in types]:
            raise error(f"{key} has {wrong[0]!r}, which is not supported; only {types[0]!r} and {types[1]!r} are")
    attention = [name == down[1] for name in get("down_block_types")]
    if attention != [name == up[1] for name in get("up_block_types")][::-1]:
        raise error(f"up_block_types={get('up_block_types')!r} does not mirror down_block_types")
    if len(attention) != (levels := len(get("block_out_channels"))):
        raise error(f"{len(attention)} down_block_types for {levels} block_out_channels")
    for key in depths:
        check_whole(error, key, get(key), at_most=100)
    if (layers := levels * prod(map(get, depths))) > MAX_LAYERS:
        raise error(f"levels x {' x '.join(depths)} is {layers}, which is not supported; at most {MAX_LAYERS} is")
    return tuple(level for level, has in enumerate(attention) if has)


@contextmanager
def errors_of(error: type[LatentDiffError], said: str = "", *kinds: type[Exception]) -> Iterator[None]:
    """Any LatentDiffError becomes one of a kind, and a library's error, of the kinds named, what is `said` of it."""
    try:
        yield
    except LatentDiffError as ours:
        if isinstance(ours, error):
            raise
        raise error(str(ours)) from None
    except kinds as theirs:
        words = str(theirs).split() or [type(theirs).__name__]
        raise error(f"{said} ({one_line(' '.join(words))})") from theirs


def one_line(value: object) -> str:
    """What a stranger's file says, fit for a line of ours."""
    text = str(value)
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 300 else f"{text[:300]}…"


def several(names: Iterable[str], most: int = 3) -> str:
    """The first few of some names."""
    ordered = sorted(names)
    return ", ".join(map(one_line, ordered[:most])) + (", …" if len(ordered) > most else "")


def complain(where: object, problem: str, names: Iterable[str]) -> None:
    """Refuse tensors that have a problem, if there are any.

    Raises:
        LatentDiffError: there are; it has the first few names.
    """
    if names := set(names):
        count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
        raise LatentDiffError(f"{where}: {problem} {count}: {several(names)}")
