"""Does the share of copies find a perfect copier, and leave pictures alone that the model has never seen?

    python benchmarks/copy_share.py 'data.source=pictures/emoji-256/*.parquet' --strangers 'pictures/others/*.parquet'

The perfect copier draws training pictures as well as the VAE can: they are encoded, decoded and rounded to 8 bits, and
go through `evaluate`'s own search for the nearest training picture. So do held-out pictures, and those of
`--strangers`, of things that the training set does not show. Then once more with 20 near-duplicates in the training
set: copied pictures saved as JPEG of quality 90. What is encoded is kept in `--output`.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from latentdiff import LatentPipeline
from latentdiff.cli.memory import keep_freed_memory
from latentdiff.data.pictures import to_images
from latentdiff.data.sources import open_source
from latentdiff.evaluation.comparison import COPIED, mean_figures
from latentdiff.evaluation.copies import find_nearest, merge_duplicates
from latentdiff.evaluation.evaluate import ENCODED, MAX_HELD_OUT, MAX_TRAINING
from latentdiff.evaluation.gallery import embed, read_pictures
from latentdiff.sections import DataConfig

NEAR_DUPLICATES = 20


def as_jpeg(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture saved as JPEG and read again."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=90)
    return np.asarray(Image.open(file))


def main() -> int:
    """Run the command; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="data.source=... of the model's pictures")
    parser.add_argument("--strangers", help="source whose held-out pictures show other things")
    parser.add_argument("--model")
    parser.add_argument("--output", type=Path, default=Path("outputs/copy-share"))
    parser.add_argument("--pictures", type=int, default=500, help="training pictures to copy")
    options = parser.parse_args()
    pipe, encoded = LatentPipeline.from_pretrained(options.model), options.output / ENCODED
    keep_freed_memory(pipe.device)
    size, weights = pipe.image_size, next(pipe.vae.parameters())
    data = DataConfig(source=options.source.removeprefix("data.source="), image_size=size, flip=False)

    @torch.no_grad()
    def drawn(latents: Tensor) -> Tensor:
        """Return the latents of pictures that are decoded from latents and encoded again."""

        def images() -> Iterator[tuple[int, NDArray[np.uint8]]]:
            for part in torch.split(latents, 32):
                yield from enumerate(map(np.asarray, to_images(pipe.vae.decode(part.to(weights)).float().cpu())))

        return embed(pipe.vae, images(), size, folder=encoded).latents

    train, held_out = open_source(data)
    gallery = embed(pipe.vae, read_pictures(train, data, MAX_TRAINING, []), size, folder=encoded)
    others = embed(pipe.vae, read_pictures(held_out, data, MAX_HELD_OUT, []), size, reconstruct=True, folder=encoded)
    same = float(others.quality[2].median())
    rows = np.unique(np.linspace(0, len(gallery.indices) - 1, options.pictures).round().astype(int)).tolist()
    queries = {"a perfect copier": drawn(gallery.latents[rows]), "held-out pictures": drawn(others.latents)}
    if options.strangers:
        theirs = open_source(data.model_copy(update={"source": options.strangers}))[1]
        found = embed(pipe.vae, read_pictures(theirs, data, MAX_HELD_OUT, []), size, folder=encoded)
        queries["strangers"] = drawn(found.latents)
    twice = [gallery.indices[row] for row in rows[:: max(1, len(rows) // NEAR_DUPLICATES)][:NEAR_DUPLICATES]]
    pictures = (
        (index, as_jpeg(picture))
        for index, picture in read_pictures(train, data, MAX_TRAINING, [])
        if index in set(twice)
    )
    again = embed(pipe.vae, pictures, size, folder=encoded).latents
    sets = {"as it is": gallery.latents, f"with {len(twice)} near-duplicates": torch.cat([gallery.latents, again])}
    print(f"{weights.dtype}; near-duplicates differ by at most {same:.3f} (root mean square of the latents)\n")
    print("| training set | merged | " + " | ".join(queries) + " |\n|---|---|" + "---|" * len(queries))
    for name, latents in sets.items():
        groups = merge_duplicates(latents, range(len(latents)), same)
        cells = []
        for asked in queries.values():
            copied = find_nearest(asked, latents, groups).copied
            (figure,) = mean_figures({COPIED: copied}, range(len(copied)), len(latents), 0)
            cells.append(f"{figure} of {len(copied)}")
        print(f"| {name} | {len(latents) - int(groups.max()) - 1} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
