"""VAE and latent training: stages, loop, losses, optimizer, EMA and checkpoints."""
