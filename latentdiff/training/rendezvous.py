"""How the processes of a run find each other, also after torchrun has started them again.

torchrun keeps one store for all attempts, so a new process may read the address that a dead one left there, and the
attempt fails or hangs (pytorch issues #135712 and #167288): a race that two small processes lost 7 times out of 7 here.
So the keys of each attempt get a prefix of their own. The number of the attempt is the same for all processes only on
one machine.
"""

import os
import sys
from collections.abc import Iterator
from datetime import timedelta

from accelerate.utils import InitProcessGroupKwargs
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

TIMEOUT = timedelta(hours=12)  # one may be encoding or writing a checkpoint while the rest wait
SCHEME = "latentdiff-attempt"

Found = tuple[Store, int, int]  # store, rank, number of processes


def process_group_settings() -> InitProcessGroupKwargs:
    """Return how accelerate is to set up the process group; warn if a restart may not find its processes."""
    machines, in_launcher = os.environ.get("GROUP_WORLD_SIZE"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or not in_launcher:
        return InitProcessGroupKwargs(timeout=TIMEOUT)
    if machines != "1":
        if os.environ.get("LOCAL_RANK") == "0":
            sys.stderr.write("warning: started again on several machines, whose processes may wait for dead ones; use "
                             "the launcher's c10d rendezvous, with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n")  # fmt: skip
        return InitProcessGroupKwargs(timeout=TIMEOUT)
    return InitProcessGroupKwargs(init_method=f"{SCHEME}://", timeout=TIMEOUT)


def _of_this_attempt(url: str, timeout: timedelta = TIMEOUT, **_: object) -> Iterator[Found]:
    """Yield what torch's own rendezvous finds, with keys that only this attempt uses."""
    for store, rank, size in rendezvous("env://", timeout=timeout):
        yield PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store), rank, size


register_rendezvous_handler(SCHEME, _of_this_attempt)  # type: ignore[no-untyped-call]
