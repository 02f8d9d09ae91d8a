"""How drawn pictures compare with the training pictures as a whole: figures with intervals, and those left out."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .distances import CMMD_SCALE, Pairs, discrepancy, distance, frechet_distance, gaussian, neighbors, polynomial
from .figures import Figure, estimate, halve
from .networks import FeatureNetwork

FEWEST = 16  # pictures of either kind
CROWD = 64  # pictures that figures of neighbors need: of two dozen, their intervals are too short
MOST = 4_000  # pictures compared pair by pair, chosen at random
FRECHET, RELIABLE = 2_000, 10_000  # pictures that a Fréchet distance needs, and from which its bias is small
NEIGHBORS = ("precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class PictureSet:
    """Features of some pictures, and what they show."""

    features: dict[str, Tensor]  # (N, D), by their name
    captions: Sequence[Hashable]  # equal ones have the same text
    concepts: Sequence[Hashable]

    def __len__(self) -> int:
        return len(self.captions)

    def some(self, count: int, seed: int) -> "PictureSet":
        """Return `count` random pictures, or all if there are fewer."""
        rows = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        return PictureSet({name: features[rows] for name, features in self.features.items()},
                          [self.captions[row] for row in rows], [self.concepts[row] for row in rows])  # fmt: skip


def set_figures(
    real: PictureSet, drawn: PictureSet, seed: int, *, clip: str = "", manifold: bool = True
) -> tuple[list[Figure], list[str]]:
    """Compare two sets of pictures in all their features; also say which figures are left out, and why.

    `clip` names features in the common space of a CLIP; without `manifold`, the figures of neighbors are not computed.
    """
    if min(len(real), len(drawn)) < FEWEST:
        have = f"{len(drawn)} drawn and {len(real)} real pictures"
        return [], [f"distances are left out: at least {FEWEST} of each are needed, and there are {have}"]
    figures: list[Figure] = []
    crowd = min(len(real), len(drawn)) >= CROWD
    left_out = [f"precision, recall, density and coverage are left out: they need {CROWD} drawn and real pictures"]
    left_out *= manifold and not crowd
    drawn_some = drawn.some(MOST, seed)
    for name in drawn.features:
        if manifold and crowd:
            figures += _neighbor_figures(name, real.some(len(drawn_some), seed), drawn_some, seed)
        figures += _kernel_figures(name, real.some(MOST, seed), drawn_some, seed, cmmd=name == clip)
    if min(len(real), len(drawn)) < FRECHET:
        return figures, [*left_out, f"Fréchet distance (FID): {len(drawn)} drawn and {len(real)} real; "
                         f"below {FRECHET:,} its bias exceeds what it measures; KID has none"]  # fmt: skip
    halves = halve(real.concepts, drawn.concepts, seed)
    for name, features in drawn.features.items():
        figures += estimate(
            [f"{name}: Fréchet distance"],
            lambda rows, columns, x=real.features[name], y=features: torch.tensor(  # type: ignore[misc]
                [frechet_distance(x[rows], y[columns])], dtype=torch.float64
            ),
            halves,
            (len(real), len(drawn)),
        )
    few = min(len(real), len(drawn)) < RELIABLE
    return figures, [f"Fréchet distance: with fewer than {RELIABLE:,} pictures it is too large; compare it only with "
                     "others of as many"] * few  # fmt: skip


def _neighbor_figures(name: str, real: PictureSet, drawn: PictureSet, seed: int) -> list[Figure]:
    pairs = Pairs.of(distance, real.features[name], drawn.features[name])
    halves, names = halve(real.concepts, drawn.concepts, seed), [f"{name}: {what}" for what in NEIGHBORS]
    shares = [each for each in names if not each.endswith("density")]
    return estimate(names, lambda rows, columns: neighbors(pairs.part(rows, columns)), halves,
                    (len(real), len(drawn)), shares=shares)  # fmt: skip


def _kernel_figures(name: str, real: PictureSet, drawn: PictureSet, seed: int, *, cmmd: bool) -> list[Figure]:
    ids = {text: number for number, text in enumerate(dict.fromkeys([*real.captions, *drawn.captions]))}
    captions, prompts = (torch.tensor([ids[text] for text in each.captions]) for each in (real, drawn))
    halves, figures = halve(real.concepts, drawn.concepts, seed), []
    kinds = [("kernel distance (KID)", polynomial, 1.0)] + [("CMMD", gaussian, CMMD_SCALE)] * cmmd
    for what, kernel, scale in kinds:
        pairs = Pairs.of(kernel, real.features[name], drawn.features[name])
        figures += estimate(
            [f"{name}: {what}"],
            lambda rows, columns, pairs=pairs, scale=scale: torch.tensor(  # type: ignore[misc]
                [scale * discrepancy(pairs.part(rows, columns), captions[rows], prompts[columns])], dtype=torch.float64
            ),
            halves,
            (len(real), len(drawn)),
        )
    return figures


def mean_figures(values: dict[str, Tensor], concepts: Sequence[Hashable], gallery: int, seed: int) -> list[Figure]:
    """Return the mean over drawn pictures of values (M,), by name; those named `share …` are shares."""
    table = torch.stack(list(values.values())).double()
    return estimate(list(values), lambda _, columns: table[:, columns].mean(1), halve((), concepts, seed),
                    (gallery, len(concepts)), shares=[name for name in values if name.startswith("share")])  # fmt: skip


def clip_scores(network: FeatureNetwork, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return 100 times the cosine of each picture's CLIP features (M, D) and its prompt's, and another prompt's.

    Hessel et al. 2021 (arXiv 2104.08718), without their clamping at zero.
    """
    texts = network.texts(prompts)
    scores = 100.0 * images @ texts.T
    others = torch.arange(len(prompts)).roll(len(prompts) // 2)
    return {
        f"{network.name}: CLIP score": scores.diagonal(),
        f"{network.name}: CLIP score of shuffled prompts": scores.gather(1, others[:, None])[:, 0],
    }
