"""Text files that people bring: their encoding and their lines."""

import codecs
import json
import re
from typing import Any

BYTE_ORDER_MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


SURROGATES = re.compile("[\ud800-\udfff]")  # no text has them: Python's sign for bytes that are not UTF-8


def encoding_of(start: bytes) -> str:
    """Return the encoding of a text by its byte order mark; UTF-8 without one."""
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")


def decode(data: bytes) -> str:
    """Decode a text file with or without a byte order mark; raise UnicodeError if it is not what it says.

    A NUL is no text either: it is how UTF-16 without a mark looks as UTF-8.
    """
    if "\0" in (text := data.decode(encoding_of(data))):
        raise UnicodeError("contains NUL characters")
    return text


def lines_of(text: str) -> list[str]:
    """Split at line ends only, unlike `str.splitlines`, which also splits at U+2028, form feeds and others."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def json_as_written(text: str) -> Any:
    """Parse JSON with numbers as they are written; NaN, which some writers put for a missing value, is None."""
    return json.loads(text, parse_float=str, parse_int=str, parse_constant=lambda _: None, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found
