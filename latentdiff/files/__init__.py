"""Models on disk: folders, single files and model cards. Imports nothing, so that `unet` and `vae` stay light."""
