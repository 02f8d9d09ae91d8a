"""Train the UNet: `accelerate launch train_latent.py --config NAME [section.key=value ...]`; without one, `demo`."""

from latentdiff.cli import run_stage

if __name__ == "__main__":
    run_stage("train-latent")
