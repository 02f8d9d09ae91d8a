"""What the UNet starts from: new weights, a trained one, or experts that are all split from one."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from text_encoder import TextEncoder
from unet import Denoiser, Experts, UNet
from unet.experts import edges_of, new_denoiser
from vae import VAE

from ..config import Config
from ..diffusion.process import Process
from ..errors import LatentDiffError
from ..files.experts import open_unet
from ..files.open import read_json
from ..files.scheduler import SAVED, read_scheduler
from ..files.unfinished import find_part


def new_unet(config: Config, vae: VAE, text_encoder: TextEncoder) -> Denoiser:
    """Create or load the UNet of the config, or its experts; raise unless it fits the VAE and the text encoder."""
    size = config.data.image_size // vae.config.downsampling
    channels, width = vae.config.latent_channels, text_encoder.context_dim
    edges = config.unet.edges(config.diffusion.num_timesteps)
    if (trained := _trained(config)) is None:
        unet = new_denoiser(config.unet.build(channels, width, size), edges)
    else:
        unet = _load(config, *trained, channels, width)
        for each in unet.members if isinstance(unet, Experts) else [unet]:
            each.config = replace(each.config, sample_size=size)
        wanted = config.unet.trajectory_attention
        if isinstance(unet, UNet) and wanted and not unet.config.trajectory_attention:
            unet.add_trajectory_attention(wanted)
        if config.unet.experts_from is not None and isinstance(unet, UNet) and edges is not None:
            unet = Experts((copy.deepcopy(unet) for _ in edges[1:]), edges)
        if edges_of(unet) != edges:
            raise LatentDiffError(f"{trained[0]}={trained[1]}: {_found(unet)}, but unet.experts={config.unet.experts}; "
                                  "unet.experts_from=FOLDER splits a single UNet into experts")  # fmt: skip
    unet.set_attention_backend(config.unet.attention)
    return unet


def _trained(config: Config) -> tuple[str, str] | None:
    """The setting that names trained weights, and its value."""
    if config.unet.experts_from is not None:
        return "unet.experts_from", config.unet.experts_from
    return None if config.unet.pretrained is None else ("unet.pretrained", config.unet.pretrained)


def _found(unet: Denoiser) -> str:
    edges = edges_of(unet)
    return "a single UNet" if edges is None else f"experts that begin at timesteps {', '.join(map(str, edges[:-1]))}"


def _load(config: Config, setting: str, name: str, channels: int, width: int) -> Denoiser:
    folder = Path(find_part(name, "unet", setting))
    with torch.device("cpu"):  # also if called under the meta device
        unet, saved = open_unet(folder), _saved_process(folder.parent)
    for what, needed in (("in_channels", channels), ("out_channels", channels), ("context_dim", width)):
        if (found := getattr(unet.config, what)) != needed:
            raise LatentDiffError(f"{setting}={name}: its {what} is {found}; this VAE and this text "
                                  f"encoder need {needed}")  # fmt: skip
    history, wanted = unet.config.trajectory_attention, config.unet.trajectory_attention
    if history and wanted not in (0, history):
        raise LatentDiffError(f"{setting}={name}: its trajectory_attention is {history}, but unet.trajectory_attention="
                              f"{wanted}; leave that out")  # fmt: skip
    if saved is not None and saved.prediction != config.diffusion.prediction:
        raise LatentDiffError(f"{setting}={name}: it predicts {saved.prediction}, but diffusion.prediction="
                              f"{config.diffusion.prediction}; set it to {saved.prediction}")  # fmt: skip
    return unet


def _saved_process(model: Path) -> Process | None:
    """The prediction and noise schedule of a saved model, or None if it has no scheduler config."""
    path = model / "scheduler" / "scheduler_config.json"
    return read_scheduler(read_json(path, ""), path, SAVED) if path.is_file() else None


def pretrained_warnings(config: Config) -> Iterator[str]:
    """Yield warnings about settings that do not match the trained UNet, which is usually an oversight."""
    if (trained := _trained(config)) is None:
        return
    setting, name = trained
    if not config.text_encoder.pretrained:
        yield (f"{setting}={name}: it does not know a new text encoder; set text_encoder.pretrained to the one it was "
               "trained with")  # fmt: skip
    saved = _saved_process(Path(find_part(name, "unet", setting)).parent)
    if saved is not None and not torch.equal(saved.schedule.betas, config.diffusion.build().betas):
        yield (f"{setting}={name}: it was trained with another noise schedule than the one in `diffusion`; check "
               "zero_terminal_snr")  # fmt: skip
