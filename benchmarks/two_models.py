"""Does `evaluate --against` tell two models apart, and a model not from itself?

    python benchmarks/two_models.py 'data.source=pictures/emoji-256/*.parquet' --model emoji-256 --other runs/demo

Draws the captions of some training pictures twenty times, each time from other seeds, and compares one time with the
next as two models: of these ten comparisons, about nine intervals (90 %) should hold 0. Then the other model, with the
seeds of the first time. A subset of the training pictures stands for all of them, to save time. What is drawn is kept
in `--output`; given again, the command goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from latentdiff import LatentPipeline
from latentdiff.assets import EMOJI_STYLE
from latentdiff.cli.memory import keep_freed_memory
from latentdiff.data.sources import open_source
from latentdiff.evaluation.comparison import Reference
from latentdiff.evaluation.concepts import Asked, choose, compare, concepts_of
from latentdiff.evaluation.evaluate import ENCODED, Clock, Studio
from latentdiff.evaluation.figures import Figure, difference
from latentdiff.evaluation.gallery import embed, read_pictures
from latentdiff.sampling.settings import SamplingSettings
from latentdiff.sections import DataConfig

TIMES = 20


def main() -> int:
    """Run the command; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="data.source=... of the model's pictures")
    parser.add_argument("--model")
    parser.add_argument("--other", required=True)
    parser.add_argument("--output", type=Path, default=Path("outputs/two-models"))
    parser.add_argument("--pictures", type=int, default=500, help="training pictures to compare with")
    parser.add_argument("--concepts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    pipe, other = map(LatentPipeline.from_pretrained, (options.model, options.other))
    keep_freed_memory(pipe.device)
    data = DataConfig(source=options.source.removeprefix("data.source="), image_size=pipe.image_size, flip=False)
    train, held_out = open_source(data)
    encoded = options.output / ENCODED
    gallery = embed(pipe.vae, read_pictures(train, data, options.pictures, []), pipe.image_size, folder=encoded)
    some = embed(pipe.vae, read_pictures(held_out, data, 32, []), pipe.image_size, reconstruct=True, folder=encoded)
    concepts = concepts_of(train, EMOJI_STYLE)
    reference = Reference(train, data, concepts, gallery, float(some.quality[2].median()), None, seed=0)
    chosen = [gallery.indices[number] for number in choose([concepts[i] for i in gallery.indices], options.concepts, 0)]

    def figures(model: LatentPipeline, time: int) -> list[Figure]:
        settings = SamplingSettings(guidance_scale=3, num_steps=options.steps, seed=10_000 * time, progress=False)
        asked = Asked.of(train, concepts, chosen, settings)
        studio = Studio(pipe, settings, None, options.output, Clock(lambda _: None))
        images, queries = studio.draw(model, asked)
        return reference.measure(queries, compare(gallery, train, data, concepts, asked, images, queries))[0]

    again = []
    for time in range(TIMES):
        again.append(figures(pipe, time))
        print(f"drawn {time + 1} of {TIMES} times", file=sys.stderr, flush=True)
    theirs = figures(other, 0)
    print(f"| figure | intervals that hold 0, of {TIMES // 2} | the other model's difference |\n|---|---|---|")
    for number, figure in enumerate(again[0]):
        pairs = [difference(again[time][number], again[time + 1][number]) for time in range(0, TIMES, 2)]
        held = sum(each.low <= 0 <= each.high for each in pairs)
        print(f"| {figure.name} | {held} | {difference(theirs[number], figure)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
