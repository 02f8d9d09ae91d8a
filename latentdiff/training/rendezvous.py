"""How the processes of a run find each other, also after torchrun has started them again.

torchrun keeps one store for all attempts, so a new process may read the address that a dead one left there: the attempt
fails or hangs (pytorch issues #135712 and #167288; with torch 2.13, 7 of 7 attempts of two small processes did). So the
keys of each attempt get a prefix of their own. The number of the attempt is the same for all processes only on one
machine; with several, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each attempt a new store.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta

from accelerate.utils import InitProcessGroupKwargs
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

TIMEOUT = timedelta(hours=12)  # one may be encoding or writing a checkpoint while the rest wait
SCHEME = "attempt"

Found = tuple[Store, int, int]  # store, rank, number of processes


def process_group_settings() -> InitProcessGroupKwargs:
    """Return how accelerate is to set up the process group."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if not restarted or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return InitProcessGroupKwargs(timeout=TIMEOUT)
    with suppress(RuntimeError):  # registered by an earlier launch of this process
        register_rendezvous_handler(SCHEME, _of_this_attempt)  # type: ignore[no-untyped-call]
    return InitProcessGroupKwargs(init_method=f"{SCHEME}://", timeout=TIMEOUT)


def _of_this_attempt(url: str, timeout: timedelta = TIMEOUT, **_: object) -> Iterator[Found]:
    """Yield what torch's own rendezvous finds, with keys that only this attempt uses."""
    for store, rank, size in rendezvous("env://", timeout=timeout):
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        yield PrefixStore(attempt, store), rank, size
