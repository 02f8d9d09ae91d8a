"""From pictures on disk to batches: sources, pixels, the order of samples, the latent cache."""
