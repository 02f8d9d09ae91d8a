"""Measuring and looking: quality of reconstructions, grids of pictures."""
