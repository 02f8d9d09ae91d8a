"""The math of diffusion: noise schedule, process, samplers and guidance. Nothing here imports a model."""
