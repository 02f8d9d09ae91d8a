"""Train the UNet: `accelerate launch train_latent.py --config demo [section.key=value ...]`; `demo` is the default."""

from latentdiff.cli import run_stage

if __name__ == "__main__":
    run_stage("train-latent")
