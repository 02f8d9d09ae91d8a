"""Sample order and random numbers of training, as a pure function of (seed, step, position in the global batch).

There is no state to advance: step 1,000,000 is computed like step 1, for any number of processes and after any restart.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from ..errors import LatentDiffError

PURPOSES = {"train_vae": 1, "train_latent": 2, "validation": 3, "samples": 4, "weights": 5}
ROUNDS = 6  # of the Feistel network


def random_stream(seed: int, purpose: str, step: int, position: int) -> np.random.Generator:
    """Return the random generator for one picture in one step.

    Philox is counter-based (Salmon et al., SC 2011): every stream can be addressed directly.
    """
    key = np.array([seed % 2**64, PURPOSES[purpose]], dtype=np.uint64)
    counter = np.array([0, 0, position, step], dtype=np.uint64)  # the first word advances as numbers are generated
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def shuffled_index(position: int, size: int, seed: int) -> int:
    """Return the picture at a position of an endless stream in which each epoch is a new permutation of 0 ... size - 1.

    A Feistel network on the next power of four, with cycle walking (Black & Rogaway, CT-RSA 2002): an index takes the
    same time and no memory, for a thousand pictures or a billion.
    """
    epoch, index = divmod(position, size)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(ROUNDS):
            digest = blake2b(struct.pack("<QQQB", seed % 2**64, epoch, right, number), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half | right
        if index < size:
            return index


@dataclass(frozen=True)
class BatchPlan:
    """Split of the global batch into the micro-batches of each process; raises LatentDiffError if it is uneven."""

    batch_size: int  # pictures per step, over all processes
    rank: int = 0  # of this process
    world_size: int = 1  # number of processes
    micro_batch_size: int | None = None  # pictures per forward pass of a process; None: its whole share of the batch

    def __post_init__(self) -> None:
        if self.batch_size % (self.world_size * (self.micro_batch_size or 1)):
            micro = f" x micro_batch_size {self.micro_batch_size}" if self.micro_batch_size else ""
            raise LatentDiffError(
                f"batch_size={self.batch_size}: expected a multiple of {self.world_size} processes{micro}"
            )

    @property
    def pictures_per_pass(self) -> int:
        """Number of pictures in a micro-batch."""
        return self.micro_batch_size or self.batch_size // self.world_size

    @property
    def accumulation_steps(self) -> int:
        """Number of micro-batches per step."""
        return self.batch_size // (self.world_size * self.pictures_per_pass)

    def global_indices(self, number: int) -> range:
        """Return the positions in the global batch of this process's micro-batch `number` of a step."""
        first = (number * self.world_size + self.rank) * self.pictures_per_pass
        return range(first, first + self.pictures_per_pass)

    def items(self, number: int, size: int, seed: int, purpose: str) -> Iterator[tuple[int, int, np.random.Generator]]:
        """Yield (batch position, picture, random stream) for every item of micro-batch `number` of the run."""
        step, part = divmod(number, self.accumulation_steps)
        for i in self.global_indices(part):
            yield i, shuffled_index(step * self.batch_size + i, size, seed), random_stream(seed, purpose, step, i)
