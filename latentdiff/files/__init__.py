"""Models on disk: diffusers' folders, single files of the original layout, cards. Imports nothing by itself."""
