"""Which split a file belongs to, from its name or from the folder it lies in."""

from __future__ import annotations

import re
from collections.abc import Sequence

# As Hugging Face datasets has them.
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def split_of_folder(name: str, asked: Sequence[str]) -> str:
    """The split that a folder of pictures is, by its whole name: of `asked`, train, validation and test, or ""."""
    return next((split for split, words in _words(asked).items() if name.lower() in words), "")


def split_of_file(name: str, asked: Sequence[str]) -> str:
    """The split that a file with many pictures belongs to, by a word in its name; "" for none."""
    for split, words in _words(asked).items():
        if any(re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", name.lower()) for word in words):
            return split
    return ""


def _words(asked: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {split: WORDS.get(split, (split.lower(),)) for split in (*asked, *WORDS)}
