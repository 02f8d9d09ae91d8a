"""The mathematics: noise schedule, diffusion process, samplers, guidance. No model is imported here."""
