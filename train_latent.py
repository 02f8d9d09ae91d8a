"""Train the UNet: `accelerate launch train_latent.py --config NAME [section.key=value ...]`; without one, `demo`."""

from latentdiff.cli import run_stage
from latentdiff.training.stages import train_latent

if __name__ == "__main__":
    run_stage(train_latent, "demo")
