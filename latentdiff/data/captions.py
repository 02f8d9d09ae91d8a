"""Which columns of a table hold captions, and what a cell of one says."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import LatentDiffError, check_choice

CAPTION_NAMES = ("text", "caption", "captions", "txt", "prompt")


def clean(values: Iterable[Any]) -> list[str]:
    """All captions in the cells of a row: stripped, without empty ones, each once, in order.

    Raises:
        LatentDiffError: a cell holds neither text nor a list of texts.
    """
    found: dict[str, None] = {}
    for value in values:
        for text in value if isinstance(value, list | tuple) else [value]:
            found[_text(text)] = None
    found.pop("", None)
    return list(found)


def find_caption_columns(columns: Sequence[str], asked: Sequence[str], where: str) -> tuple[str, ...]:
    """The columns asked for, or else the first of the usual names that is there.

    Raises:
        LatentDiffError: a column that was asked for is not there, or none of the usual names is.
    """
    for name in asked:
        check_choice(f"caption column of {where}", name, columns)
    if asked:
        return tuple(asked)
    for name in CAPTION_NAMES:
        if name in columns:
            return (name,)
    raise LatentDiffError(
        f"{where}: no caption column among {', '.join(columns)}; name it in data.caption_columns, "
        f"or call it {', '.join(CAPTION_NAMES[:-1])} or {CAPTION_NAMES[-1]}"
    )


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str | int | float):  # a column of numerals is a column of numbers to whoever reads CSV
        return str(value).strip()
    raise LatentDiffError(f"caption {str(value)[:80]!r}: expected text or a list of texts, not {type(value).__name__}")
