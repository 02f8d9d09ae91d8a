"""How good are estimates of the bound from a few timesteps, against the exact sum over all of them?

    python benchmarks/likelihood_estimates.py --model emoji-256 'data.source=pictures/emoji-256/*.parquet' --pictures 20

The terms of every timestep of held-out pictures are computed once, with `--draws` draws of latents and noise, and then
resampled 1,000 times as `log_likelihood` draws them: bias of the estimate in its standard deviations, its standard
error in bits per value, and how often Student's 90 % interval has the exact sum in it. Terms are written to `--output`
as they are found, and read from there by a second run.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from likelihood import PILOTS, read, spread

from latentdiff import LatentPipeline
from latentdiff.data.sources import open_source
from latentdiff.evaluation.likelihood import Bound, LatentBound, encode, measure_proposals, widened
from latentdiff.evaluation.proposal import Proposal, stratified
from latentdiff.sections import DataConfig

RESAMPLES = 1000


def exact_terms(pipe: LatentPipeline, levels: torch.Tensor, prompt: str, draws: int, floor: float) -> torch.Tensor:
    """Return L_t of one picture (1, 3, H, W) for every t >= 1 and each draw of latents and noise, (draws, T - 1)."""
    bound, posterior, generator = LatentBound(pipe), widened(encode(pipe, levels), floor), torch.Generator()
    context, T = pipe.text_encoder([prompt]).cpu(), pipe.process.schedule.num_timesteps
    found = []
    for draw in range(draws):
        generator.manual_seed(draw)
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        noise = torch.randn(T - 1, *z.shape[1:], generator=generator)
        found.append(bound.terms(z.expand(T - 1, -1, -1, -1), noise, torch.arange(1, T), context.expand(T - 1, -1, -1)))
    return torch.stack(found)


def resample(terms: torch.Tensor, proposal: Proposal, timesteps: int, draws: int) -> dict[str, float]:
    """Estimate a picture's sum 1,000 times from its stored terms (draws, T - 1), as `log_likelihood` does."""
    generator, truth = torch.Generator().manual_seed(1), float(terms.sum(1).mean())
    estimates, covered, errors = [], [], []
    for _ in range(RESAMPLES):
        values = []
        for _ in range(draws):
            times, weights = stratified(proposal, timesteps, generator)
            which = int(torch.randint(len(terms), (), generator=generator))
            values.append(float((weights * terms[which, times - 1]).sum()))
        found = Bound(0, 0, 0, 0, 0, tuple(values), 1, 0)
        low, high = found.interval
        estimates.append(found.nats)
        errors.append(found.standard_error)
        covered.append(low <= truth <= high)
    return {"exact": truth, "one": estimates[0], "error of one": errors[0], "deviation": float(np.std(estimates)),
            "bias": (float(np.mean(estimates)) - truth) / float(np.std(estimates)),
            "coverage": float(np.mean(covered))}  # fmt: skip


def main() -> int:
    """Run the command; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="data.source=... of the model's pictures")
    parser.add_argument("--model")
    parser.add_argument("--pictures", type=int, default=20)
    parser.add_argument("--draws", type=int, default=1, help="of latents and noise, whose terms are stored")
    parser.add_argument("--floor", type=float, default=0.0, help="least standard deviation of the posterior")
    parser.add_argument("--output", type=Path, default=Path("outputs/likelihood-terms.pt"))
    options = parser.parse_args()
    pipe = LatentPipeline.from_pretrained(options.model, dtype=torch.float32)
    data = DataConfig(source=options.source.removeprefix("data.source="), image_size=pipe.image_size, flip=False)
    training, held_out = open_source(data)
    proposal = measure_proposals(pipe, *read(training, spread(training, PILOTS, offset=17), data)).bound
    options.output.parent.mkdir(parents=True, exist_ok=True)
    stored = torch.load(options.output) if options.output.is_file() else {}
    names = spread(held_out, options.pictures)
    for index in names:
        if index not in stored:
            levels, (caption,) = read(held_out, [index], data)
            stored[index] = exact_terms(pipe, levels, caption, options.draws, options.floor)
            torch.save(stored, options.output)
            print(f"picture {index}: sum of L_t {stored[index].sum(1).mean():.0f} nats", flush=True)
    value = math.log(2) * 3 * pipe.image_size**2
    for timesteps, draws in ((8, 4), (8, 8), (16, 2), (16, 4)):
        rows = [resample(stored[index], proposal, timesteps, draws) for index in names]
        bias, coverage = [row["bias"] for row in rows], [row["coverage"] for row in rows]
        print(f"{timesteps} timesteps, {draws} draws: bias {np.mean(bias):+.3f} deviations (worst "
              f"{max(bias, key=abs):+.3f}), coverage of 90 % {np.mean(coverage):.1%} (worst {min(coverage):.1%}), "
              f"deviation {np.mean([row['deviation'] for row in rows]):.1f} nats = "
              f"{np.mean([row['deviation'] for row in rows]) / value:.5f} bits per value")  # fmt: skip
        if (timesteps, draws) == (8, 8):
            for row in rows:
                print(f"  exact {row['exact']:8.1f}, estimate {row['one']:8.1f} ± {row['error of one']:.1f} nats")
    return 0


if __name__ == "__main__":
    sys.exit(main())
