"""Evaluation of models: reconstruction quality, denoising, prompt fidelity, and grids of pictures."""
