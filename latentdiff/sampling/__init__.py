"""Sampling from prompts: `LatentPipeline`, its settings, and the sampling loop beneath it."""
