"""From prompts to pictures: `LatentPipeline`, the loop beneath it, and what a user may ask of it."""
