"""What a training step is made of, as a function of (seed, step, place in the global batch) and of nothing else.

There is no state: step 1,000,000 is asked for as step 1 is, by one process or by a thousand, before or after a restart.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from ..errors import LatentDiffError

PURPOSES = {"train_vae": 1, "train_latent": 2, "validation": 3, "samples": 4, "weights": 5}
ROUNDS = 6  # of the Feistel network below


def draws(seed: int, purpose: str, step: int, place: int) -> np.random.Generator:
    """Random numbers that belong to one picture of one step.

    Philox is a counter-based generator (Salmon et al., SC 2011): its stream is named, not advanced to.
    """
    key = np.array([seed % 2**64, PURPOSES[purpose]], dtype=np.uint64)
    counter = np.array([0, 0, place, step], dtype=np.uint64)  # the first word counts the numbers drawn
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def shuffled(position: int, size: int, seed: int) -> int:
    """Index of the picture at a position of the endless shuffled stream: each epoch is its own permutation of `size`.

    A Feistel network on the next power of four, walked until it lands inside (Black & Rogaway, CT-RSA 2002): one index
    costs the same, and no memory, for a thousand pictures and for a billion.
    """
    epoch, place = divmod(position, size)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for number in range(ROUNDS):
            digest = blake2b(struct.pack("<QQQB", seed % 2**64, epoch, right, number), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        place = left << half | right
        if place < size:
            return place


@dataclass(frozen=True)
class BatchPlan:
    """Which places of the global batch one process handles, micro-batch by micro-batch.

    Raises:
        LatentDiffError: the batch cannot be divided evenly.
    """

    batch_size: int  # pictures a step, over all processes
    rank: int = 0  # this process
    world_size: int = 1  # all processes
    micro_batch_size: int | None = None  # pictures a pass and process; None: all of the process's share

    def __post_init__(self) -> None:
        if self.batch_size % (self.world_size * (self.micro_batch_size or 1)):
            micro = f" x micro_batch_size {self.micro_batch_size}" if self.micro_batch_size else ""
            raise LatentDiffError(
                f"batch_size={self.batch_size}: expected a multiple of {self.world_size} processes{micro}"
            )

    @property
    def pictures_a_pass(self) -> int:
        """Pictures of one micro-batch."""
        return self.micro_batch_size or self.batch_size // self.world_size

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches a step."""
        return self.batch_size // (self.world_size * self.pictures_a_pass)

    def global_indices(self, number: int) -> range:
        """Places in the global batch of this process's micro-batch `number`."""
        first = (number * self.world_size + self.rank) * self.pictures_a_pass
        return range(first, first + self.pictures_a_pass)

    def drawn(self, number: int, size: int, seed: int, purpose: str) -> Iterator[tuple[int, int, np.random.Generator]]:
        """Place in the global batch, picture of `size` and random numbers, for each of micro-batch `number` of all."""
        step, part = divmod(number, self.accumulation_steps)
        for place in self.global_indices(part):
            yield place, shuffled(step * self.batch_size + place, size, seed), draws(seed, purpose, step, place)
