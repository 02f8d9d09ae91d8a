"""The one exception of this package for a user's mistake, and the check of a name against a list."""

from collections.abc import Iterable
from difflib import get_close_matches


class LatentDiffError(ValueError):
    """A setting, file or input that cannot be used; the message names it and says what is allowed."""


def check_choice(what: str, name: str, allowed: Iterable[str]) -> None:
    """Refuse a name that is not in the list, with the nearest one that is.

    Raises:
        LatentDiffError: `name` is not allowed.
    """
    allowed = list(allowed)
    if name not in allowed:
        near = get_close_matches(str(name), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise LatentDiffError(f"unknown {what} {name!r}: choose one of {', '.join(allowed)}{hint}")
