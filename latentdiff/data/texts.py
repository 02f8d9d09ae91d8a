"""Text files that people bring: their encoding and their lines."""

import codecs

BYTE_ORDER_MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def encoding_of(start: bytes) -> str:
    """Return the encoding of a text by its byte order mark; UTF-8 without one."""
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")


def decode(data: bytes) -> str:
    """Decode a text file with or without a byte order mark; raise UnicodeDecodeError if it is not what it says."""
    return data.decode(encoding_of(data))


def lines_of(text: str) -> list[str]:
    """Split at line ends only, unlike `str.splitlines`, which also splits at U+2028, form feeds and others."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
