"""Train the autoencoder: `accelerate launch train_vae.py --config emoji-64 [section.key=value ...]`."""

from latentdiff.cli import run_stage

if __name__ == "__main__":
    run_stage("train-vae")
