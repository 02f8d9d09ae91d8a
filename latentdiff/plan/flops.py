"""What a pass costs, without computing it: the real model on PyTorch's meta device.

Meta tensors have a shape and a dtype and no memory. FLOPs are counted operation by operation (2 a multiply-add), and
memory by following every tensor from where it is made to where it is freed. Two things differ there from a real
device and are put right by `Autocast`: autocast does not exist on the meta device, and attention would be written out.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import BertConfig, BertModel, PretrainedConfig

from text_encoder import TextEncoder
from text_encoder.files import MODELS
from unet import UNet, UNetConfig
from vae import VAE, DiagonalGaussian, VAEConfig

from ..assets import part_folder
from ..config import Config
from ..errors import LatentDiffError
from ..training.discriminator import Discriminator, discriminator_loss, generator_loss
from ..training.latent import LatentModel
from ..training.vae import Autoencoder
from ..training.vae_losses import reconstruction_nll

HALF_PRECISION: tuple[Any, ...] = (F.conv2d, F.linear, F.scaled_dot_product_attention)  # what autocast computes in it
NORMS: tuple[Any, ...] = (F.group_norm, F.layer_norm)  # float32 under autocast on GPUs


class Autocast(TorchFunctionMode):
    """torch.autocast for meta tensors, as far as our models can tell; and attention as fused kernels compute it."""

    def __init__(self, dtype: torch.dtype, *, norms_in_float32: bool) -> None:
        """Compute in `dtype`; norms in float32, as on GPUs, or in the dtype that they meet, as on CPUs."""
        super().__init__()
        self.dtype = dtype
        self.norm_dtype = torch.float32 if norms_in_float32 else None
        self.copies: dict[int, Tensor] | None = {}  # kept until the forward pass is over; None: after it

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in HALF_PRECISION:
            args = tuple(self._cast(value, self.dtype) for value in args)
            kwargs = {name: self._cast(value, self.dtype) for name, value in kwargs.items()}
        elif func in NORMS:
            dtype = self.norm_dtype or args[0].dtype
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:  # queries, keys, values; a mask costs next to nothing
            attend = torch.ops.aten._scaled_dot_product_efficient_attention
            query, key, value = args[:3]
            return attend(query, key, value, None, compute_log_sumexp=query.requires_grad or key.requires_grad)[0]
        return func(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`; what it recomputes is cast too.

        By its public name a function mode would leave itself for the whole call.
        """
        self.copies = None
        start = (torch.ones_like(loss),)
        _engine_run_backward((loss,), start, False, False, (), allow_unreachable=True, accumulate_grad=True)
        self.copies = {}

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if self.copies is None or not isinstance(value, nn.Parameter):
            return value.to(dtype)
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(dtype)
        return self.copies[id(value)]


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """FLOPs of what runs within the `with`; bytes of the tensors that it made and that are not freed yet.

    PyTorch's FlopCounterMode has the same formulas, but it keeps tensors alive where activations are recomputed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0  # of matrix products, convolutions and attention: all but a few per cent of the work
        self.live = self.peak = 0  # bytes now, and at most
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {tensor.untyped_storage()._cdata for tensor in _tensors([args, kwargs])}
        result = func(*args, **kwargs)
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known and storage._cdata not in given:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, place: int, size: int) -> None:
        self._known.discard(place)
        self.live -= size


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []


@dataclass(frozen=True)
class Vocabulary:
    """As much of a tokenizer as a text encoder asks for before there is text."""

    size: int
    model_max_length: int
    pad_token_id: int = 0

    def __len__(self) -> int:
        return self.size


@dataclass(frozen=True)
class Models:
    """The three models of a run, on the meta device, and what had to be assumed of them."""

    vae: VAE
    text_encoder: TextEncoder
    unet: UNet
    image_size: int  # pixels a side
    notes: tuple[str, ...] = ()

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w)."""
        size = self.image_size // self.vae.config.downsampling
        return self.vae.config.latent_channels, size, size

    def tokens(self, batch: int) -> tuple[Tensor, Tensor]:
        """Tokens and their mask, (B, L) each."""
        length = self.text_encoder.max_length
        return (torch.zeros(batch, length, dtype=torch.int64, device="meta"),
                torch.ones(batch, length, dtype=torch.bool, device="meta"))  # fmt: skip

    def cast(self, dtype: torch.dtype) -> Models:
        """Copies with weights in another dtype, without gradients: for drawing."""
        vae, text, unet = copy.deepcopy((self.vae, self.text_encoder, self.unet))
        for model in (vae, text, unet):
            model.to(dtype).eval().requires_grad_(False)
        unet.enable_gradient_checkpointing(False)
        return Models(vae, text, unet, self.image_size)


def build_models(config: Config) -> Models:
    """The models that a config describes; of pretrained ones the configs are read, and nothing else.

    Raises:
        LatentDiffError, VAEError, UNetError: the sizes do not fit, or a named model is not there.
    """
    notes: list[str] = []
    with torch.device("meta"):
        named = _values("vae", config.vae.pretrained)
        vae = VAE(VAEConfig.from_diffusers(named) if named else config.vae.build(config.data.image_size))
        text = _text_encoder(config, notes)
        if config.data.image_size % (factor := vae.config.downsampling):
            raise LatentDiffError(f"data.image_size={config.data.image_size}: expected a multiple of {factor}")
        size = config.data.image_size // factor
        named, channels = _values("unet", config.unet.pretrained), vae.config.latent_channels
        unet = UNet(UNetConfig.from_diffusers(named) if named else config.unet.build(channels, text.context_dim, size))
    return Models(vae, text, unet, config.data.image_size, tuple(notes))


def _values(part: str, named: str | None) -> Any:
    if named and not (path := Path(part_folder(named, part)) / "config.json").is_file():
        raise LatentDiffError(f"{part}.pretrained={named}: {path} is not there")
    return PretrainedConfig._dict_from_json_file(path) if named else None


def _text_encoder(config: Config, notes: list[str]) -> TextEncoder:
    section = config.text_encoder
    if not section.pretrained:
        notes.append(f"text_encoder.vocab_size={section.vocab_size} is the most; captions may give fewer entries")
        return TextEncoder.new(section.build(), Vocabulary(section.vocab_size, section.max_length))
    try:  # a folder, or what was downloaded before: the network is not asked
        folder = part_folder(section.pretrained, "text_encoder")
        values, _ = PretrainedConfig.get_config_dict(folder, local_files_only=True)
        kind: Any = MODELS[str(values.get("model_type"))]
        sizes = kind.config_class.from_dict(values.get("text_config", values))
    except (OSError, KeyError):
        notes.append(f"{section.pretrained} is not on this machine: BERT-base is assumed in its place")
        kind, sizes = BertModel, BertConfig()
    return TextEncoder(kind(sizes), Vocabulary(sizes.vocab_size, section.max_length), section.max_length)


def vae_step(
    inner: Autoencoder, critic: Discriminator | None, perceptual: nn.Module, autocast: Autocast, batch: int, size: int
) -> None:
    """The passes of `VAETraining.learn` over one micro-batch, where there is a critic with it."""
    pixels = torch.empty(batch, 3, size, size, device="meta")
    config = inner.vae.config
    noise = torch.empty(batch, config.latent_channels, *2 * [size // config.downsampling], device="meta")
    reconstruction, mean, logvar = inner(pixels, noise)
    distance = perceptual(pixels, reconstruction)
    nll = reconstruction_nll(pixels, reconstruction, inner.log_variance, "l1", distance)
    loss = nll.mean() + DiagonalGaussian(mean, logvar).kl().mean()
    if critic is None:
        autocast.backward(loss)
        return
    critic.requires_grad_(False)
    fooled = generator_loss(critic(reconstruction).float())
    critic.requires_grad_(True)
    for part in (loss, fooled):  # the adaptive weight
        torch.autograd.grad(part, inner.vae.decoder.conv_out.weight, retain_graph=True)
    autocast.backward(loss + fooled)
    real, fake = critic(torch.cat([pixels, reconstruction.detach().to(pixels.dtype)])).float().chunk(2)
    autocast.backward(discriminator_loss(real, fake))


def latent_loss(models: Models, inner: LatentModel, batch: int, *, cached: bool) -> Tensor:
    """The forward passes of `LatentTraining.learn` over one micro-batch."""
    x, t = torch.empty(batch, *models.latent_shape, device="meta"), torch.zeros(batch, dtype=torch.int64, device="meta")
    tokens, mask = models.tokens(batch)
    context = None
    with torch.no_grad():
        if not cached:
            models.vae.latent_posterior(torch.empty(batch, 3, *2 * [models.image_size], device="meta"))
        if inner.text_encoder is None:
            context = torch.empty(batch, tokens.shape[1], models.text_encoder.context_dim, device="meta")
            if not cached:
                models.text_encoder.encode(tokens, mask)
    return inner(x, t, context, tokens, mask).float().square().mean()


def sample_step(models: Models, counter: Counter, num_steps: int, *, guided: bool) -> None:
    """One picture as `LatentPipeline` draws it; `num_steps` like passes of the UNet are run once."""
    batch = 2 if guided else 1
    keys = models.unet.project_context(models.text_encoder.encode(*models.tokens(batch)))
    shifts = models.unet.project_time(torch.zeros(num_steps, dtype=torch.int64, device="meta"))
    x = torch.empty(batch, *models.latent_shape, dtype=keys[0][0].dtype, device="meta")
    before = counter.flops
    models.unet(x, [shift[:1] for shift in shifts], keys)
    counter.flops += (counter.flops - before) * (num_steps - 1)
    models.vae.decode(x[:1])


def size_of(module: nn.Module) -> int:
    """Bytes of the parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
