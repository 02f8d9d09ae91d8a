"""The data pipeline, from files to batches: sources, image decoding, sample order and the latent cache."""
