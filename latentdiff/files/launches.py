"""The record of a run, `run.json`, as far as others read it: which of its launches made what is there."""

from collections.abc import Sequence
from typing import Any


def last_launch(launches: Sequence[Any]) -> dict[str, Any]:
    """Return the last launch of a run; one that failed before it trained changed nothing, and counts only if all did.

    Such as one with other data, which is refused. Returns {} if there is no launch.
    """
    found = [launch for launch in launches if isinstance(launch, dict)]
    return next(
        (launch for launch in reversed(found) if not _is_refused(launch.get("end"))), found[-1] if found else {}
    )


def _is_refused(end: Any) -> bool:
    return isinstance(end, dict) and end.get("outcome") == "failed" and end.get("trained") == []
