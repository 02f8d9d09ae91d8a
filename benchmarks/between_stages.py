"""How long is it from the end of VAE training to the first step of latent training? Seconds, and hashes of the results.

    python benchmarks/between_stages.py                                   # the recipe emoji-64 with its own pictures
    python benchmarks/between_stages.py --config emoji-256 --pictures 500 data.source=pictures data.flip=false
    python benchmarks/between_stages.py --checkout ../before              # the code of another checkout

A new VAE takes the place of a trained one: it takes as long. Equal hashes mean equal bits, on the same machine with the
same number of threads. For several processes, use `accelerate launch` and give them one `output=FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from same_bits import tensors

from latentdiff.config import load_config
from latentdiff.data.sources import open_source
from latentdiff.training.launch import launch
from latentdiff.training.stages import make_caches, open_text_encoder
from latentdiff.training.vae import VAETraining
from latentdiff.training.vae_finish import finish_vae
from vae import VAE


def measure(recipe: str, overrides: list[str], pictures: int | None) -> dict[str, object]:
    """Finish a new VAE and build the caches; returns the seconds and what came out."""
    config = load_config(recipe, overrides)
    run, (train, held_out) = launch(config), open_source(config.data)
    train = train.select(range(len(train))[:pictures])
    torch.manual_seed(config.seed)
    encoder = open_text_encoder(config, train).to(run.device)
    task = VAETraining(run, run.folder, (train, held_out), VAE(config.vae.build(config.data.image_size)))
    start = time.perf_counter()
    report = finish_vae(task, run, run.folder / "vae")
    finished = time.perf_counter()
    make_caches(run, (train, held_out), VAE.from_pretrained(run.folder / "vae").to(run.device), encoder)
    end = time.perf_counter()
    return {
        "pictures": len(train),
        "seconds": round(end - start, 1),
        "of them for finishing the VAE": round(finished - start, 1),
        "vae": tensors(run.folder / "vae"),
        "cache": tensors(run.folder / "cache" / "train-latents"),
        "cache, validation": tensors(run.folder / "cache" / "validation-latents"),
        "decoder_log_scale": report["decoder_log_scale"],
    }


def main() -> int:
    """Run the command; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings such as data.source=my-pictures")
    parser.add_argument("--config", default="emoji-64", help="recipe")
    parser.add_argument("--pictures", type=int, help="use only the first ones")
    parser.add_argument("--checkout", type=Path, help="run the code of another checkout")
    given = parser.parse_args()
    if given.checkout:
        command = [sys.executable, __file__, "--config", given.config, *given.overrides]
        command += ["--pictures", str(given.pictures)] if given.pictures else []
        environment = {**os.environ, "PYTHONPATH": str(given.checkout.resolve())}
        return subprocess.run(command, env=environment, check=False).returncode
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"output={folder}", "trackers=[]", *given.overrides]
        print(json.dumps(measure(given.config, overrides, given.pictures), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
