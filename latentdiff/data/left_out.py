"""What a source does not use, by reason, so that nothing is left out in silence."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import several


class LeftOut:
    """Names of files and pictures that are not used, by reason; also remarks on some that are."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self.remarks: dict[str, list[str]] = {}

    def add(self, reason: str, names: Iterable[str]) -> None:
        """Add what is left out for a reason, which reads like `hidden files and folders`."""
        if found := list(names):
            self.names.setdefault(reason, []).extend(found)

    def remark(self, what: str, names: Iterable[str]) -> None:
        """Add what is used, but worth a word."""
        if found := list(names):
            self.remarks.setdefault(what, []).extend(found)

    def take(self, problems: Sequence[str], remarks: Sequence[str] = ()) -> NDArray[np.int64]:
        """Add those of a table's rows, `reason<TAB>name` or empty; return the indices of the rows without a problem."""
        for texts, note in ((problems, self.add), (remarks, self.remark)):
            for text in filter(None, texts):
                reason, _, name = text.partition("\t")
                note(reason, [name])
        return np.flatnonzero([not problem for problem in problems]).astype(np.int64)

    def lines(self) -> Iterator[str]:
        """Yield one line per reason and remark, with the number and the first few names."""
        return lines_about(self.names, self.remarks)


def lines_about(names: Mapping[str, Sequence[str]], remarks: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a `LeftOut` with these names and remarks."""
    for reason, several_names in names.items():
        yield f"left out: {reason}: {len(several_names)} ({several(several_names)})"
    for what, several_names in remarks.items():
        yield f"{what}: {len(several_names)} ({several(several_names)})"
