"""Copy share: how many drawn pictures are copies of training pictures.

A picture is a copy if the nearest training picture, by the VAE's latents, is less than half as far as the second
nearest (Yoon et al. 2023, who use a third). By pixels this fails: the VAE's errors are as large as the distance of two
simple pictures. Near-duplicates in the training set are one picture, or no copy of them would ever count: those whose
latents differ by no more than a picture's and its reconstruction's usually do, as a copy differs by that much.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RATIO = 0.5  # of the distances to the nearest and the second nearest training picture
BATCH = 256  # pictures compared with the training set at a time


@dataclass(frozen=True)
class Nearest:
    """The training picture nearest to each of some pictures."""

    rows: Tensor  # (Q,) of the training pictures
    ratio: Tensor  # (Q,) its distance over that of the next which is no near-duplicate of it; 0 to 1

    @property
    def copied(self) -> Tensor:
        """Which pictures are copies, (Q,) float64."""
        return (self.ratio < RATIO).double()


def merge_duplicates(latents: Tensor, indices: Sequence[int], same: float) -> Tensor:
    """Number the training pictures so that near-duplicates, and a picture and its mirror image, have one number, (N,).

    `latents` is (N, c, h, w), `indices` says which picture each is of, and near-duplicates differ by a root mean square
    of at most `same`; near-duplicates of near-duplicates are, too.
    """
    groups = torch.unique(torch.tensor(indices), return_inverse=True)[1]
    features = latents.flatten(1)
    limit = same * features.shape[1] ** 0.5
    # Means over blocks differ less than the latents do, and are few: only pairs that are close by them are compared.
    block = max(1, min(latents.shape[2:]) // 4)
    means = F.avg_pool2d(latents, block).flatten(1) * block
    for start in range(0, len(features), BATCH):
        close = torch.cdist(means[start : start + BATCH], means) < 1.001 * limit
        rows, others = close.nonzero().T
        rows += start
        ahead = rows < others
        for row, other in zip(rows[ahead].tolist(), others[ahead].tolist(), strict=True):
            if groups[row] != groups[other] and (features[row] - features[other]).norm() < limit:
                groups[groups == groups[other]] = groups[row].clone()
    return torch.unique(groups, return_inverse=True)[1]


def find_nearest(queries: Tensor, latents: Tensor, groups: Tensor) -> Nearest:
    """Find the training picture nearest to each of some pictures, all latents (., c, h, w); `groups` merges them."""
    gallery, rows, ratios = latents.flatten(1).double(), [], []
    alone = int(groups.max()) == 0  # there is no second nearest, as with a VAE that was not trained
    for part in torch.split(queries.flatten(1).double(), BATCH):
        distances = torch.cdist(part, gallery)
        by_group = torch.full((len(part), int(groups.max()) + 1), torch.inf, dtype=torch.float64)
        by_group.scatter_reduce_(1, groups.expand(len(part), -1), distances, "amin")
        rows.append(distances.argmin(1))
        first, second = by_group.topk(2 - alone, largest=False).values[:, [0, -1]].T
        ratios.append(first / second.clamp(min=1e-12))
    return Nearest(torch.cat(rows), torch.cat(ratios))
