"""The sections of a run's configuration: every setting, its default, its meaning and unit."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from text_encoder import TextEncoderConfig
from unet import UNetConfig
from vae import VAEConfig

from .diffusion.process import Prediction, Process, Variance, Weighting
from .diffusion.schedule import Schedule
from .sampling.settings import SamplingSettings


def _number(value: object) -> object:
    """YAML reads 1e-4 as a string; it is a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


SAMPLING = SamplingSettings()  # its defaults
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_number), Field(ge=0, le=1)]
Decay = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
Level = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Level, Level, Level]


class Section(BaseModel):
    """What all sections share: no unknown key, no silent conversion, no change afterwards."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class DataConfig(Section):
    """Where the pictures are and how they become pixels."""

    source: str = "builtin:emoji-mini"
    """Folder, Parquet or tar files (a glob, or one of them), a name on the hub, or `builtin:emoji-mini`."""
    train_split: str = "train"
    validation_split: str = "validation"
    """Split that is never trained on; where the source has none, `validation_share` of the pictures is held out."""
    validation_share: Annotated[float, BeforeValidator(_number), Field(gt=0, lt=1)] = 0.05
    image_column: str | None = None
    """Column with the pictures; None finds it."""
    caption_columns: tuple[str, ...] = ()
    """Columns with captions, one of which is drawn a step; empty finds them."""
    image_size: Annotated[int, Field(ge=8, le=4096)] = 256
    """Pixels a side: the shorter side is resized to it, then the middle is cut out."""
    min_size: Positive | None = None
    """Shorter side in pixels below which a picture is refused; None: image_size."""
    max_pixels: Positive = 64_000_000
    """Width times height above which a picture is refused before it is decoded."""
    background: Colour = (255, 255, 255)
    """Red, green, blue that shows through transparent pictures."""
    flip: bool = True
    """Show every other picture, at random, in the mirror."""
    quarantine: str | None = None
    """File with the names of pictures to leave out, as `latentdiff data check` writes it."""
    max_broken: Share = 0.01
    """Share of broken pictures above which the run stops."""


class ModelSection(Section):
    """A new model of some shape, or one that exists: then the shape is its own, and none is recorded."""

    pretrained: str | None = None
    also_used: ClassVar[tuple[str, ...]] = ()  # settings that are no sizes, so a pretrained model has them too

    def sizes(self) -> dict[str, Any]:
        """The settings that a pretrained model brings along."""
        others = {"pretrained", *self.also_used}
        return {name: getattr(self, name) for name in type(self).model_fields if name not in others}

    @model_serializer(mode="wrap")
    def _what_counts(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        kept = set(type(self).model_fields) if self.pretrained is None else {"pretrained", *self.also_used}
        return {name: value for name, value in serialize(self).items() if name in kept}


class VAESection(ModelSection):
    """Shape of the autoencoder (see vae/config.py); f = 2 ** (levels - 1)."""

    pretrained: str | None = None
    """Folder of a trained VAE to use as it is, or `builtin:emoji-64`; then train_vae and the sizes are ignored."""
    block_out_channels: tuple[Positive, ...] = (128, 256, 512, 512)
    layers_per_block: Positive = 2
    latent_channels: Positive = 4
    attention_levels: tuple[Count, ...] = ()
    mid_attention: bool = True
    norm_groups: Positive = 32

    def build(self, image_size: int) -> VAEConfig:
        """The VAE's own config."""
        return VAEConfig(**self.sizes(), scale_factor=1.0, sample_size=image_size)


class TextEncoderSection(ModelSection):
    """The text encoder: a new BERT with a vocabulary learnt from the captions, or one that exists."""

    pretrained: str | None = None
    """Folder or hub name of a BERT, or `builtin:emoji-64`; then only `train` and `max_length` below are used."""
    also_used: ClassVar[tuple[str, ...]] = ("train", "max_length")
    train: bool = True
    """Train it with the UNet; a frozen one lets its features be cached."""
    width: Positive = 256
    num_layers: Positive = 4
    num_heads: Positive = 4
    vocab_size: Positive = 8192
    """Entries of the vocabulary at most."""
    max_length: Annotated[int, Field(ge=3, le=512)] = 77
    """Tokens of a prompt, [CLS] and [SEP] included."""

    def build(self) -> TextEncoderConfig:
        """The new BERT's own config."""
        return TextEncoderConfig(self.width, self.num_layers, self.num_heads)


class UNetSection(ModelSection):
    """Shape of the UNet (see unet/config.py); channels and context width follow from the VAE and the text encoder."""

    pretrained: str | None = None
    """Folder of a trained UNet to start from, or `builtin:emoji-64`; then the sizes below are ignored."""
    also_used: ClassVar[tuple[str, ...]] = ("attention",)
    block_out_channels: tuple[Positive, ...] = (320, 640, 1280, 1280)
    layers_per_block: Positive = 2
    attention_levels: tuple[Count, ...] = (0, 1, 2)
    num_heads: Positive | tuple[Positive, ...] | None = None
    """None: width / 64."""
    transformer_layers: Positive = 1
    linear_projection: bool = False
    norm_groups: Positive = 32
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Backend of the attention layers; `xformers` needs an NVIDIA GPU and `pip install 'latentdiff[xformers]'`."""

    def build(self, latent_channels: int, context_dim: int, sample_size: int) -> UNetConfig:
        """The UNet's own config."""
        return UNetConfig(**self.sizes(), in_channels=latent_channels, out_channels=latent_channels,
                          context_dim=context_dim, sample_size=sample_size)  # fmt: skip


class DiffusionSection(Section):
    """The forward process and the loss (latentdiff/diffusion/)."""

    schedule: str = "scaled_linear"
    num_timesteps: Annotated[int, Field(ge=2)] = 1000
    beta_start: PositiveFloat | None = None
    beta_end: PositiveFloat | None = None
    zero_terminal_snr: bool = False
    """Let the last timestep be pure noise (arXiv 2305.08891); the words arrive later then (docs/recipes.md)."""
    prediction: Prediction = "v"
    weighting: Weighting = "simple"
    """`min_snr` denoises finer and learns the words later (docs/recipes.md)."""
    min_snr_gamma: PositiveFloat = 5.0
    variance: Variance = "beta"
    """Variance of the reverse step, which the elbo weighting needs."""
    caption_dropout: Share = 0.1
    """Share of captions replaced by the empty prompt, so that guidance works."""

    def build(self) -> Schedule:
        """The noise schedule."""
        return Schedule.named(self.schedule, self.num_timesteps, beta_start=self.beta_start, beta_end=self.beta_end,
                              zero_terminal_snr=self.zero_terminal_snr)  # fmt: skip

    def process(self) -> Process:
        """The schedule with the prediction."""
        return Process(self.build(), self.prediction)


class TrainSection(Section):
    """What both trainings share. A step is one optimizer update."""

    steps: Positive = 100_000
    batch_size: Positive = 32
    """Pictures a step, over all processes."""
    micro_batch_size: Positive | None = None
    """Pictures a pass and process; the rest is accumulated. None: all at once."""
    learning_rate: PositiveFloat = 1e-4
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a half cosine down to `final_lr` at the last step."""
    final_lr: NonNegative = 0.0
    """Where the cosine ends."""
    warmup_steps: Count = 500
    weight_decay: NonNegative = 0.01
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decay of AdamW's first and second moments."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients with a larger norm are scaled down to it."""
    max_skipped: Positive = 20
    """Steps in a row with a loss that is not finite, after which the run saves and stops."""
    ema_sigma_rel: Annotated[float, BeforeValidator(_number), Field(gt=0, le=0.28)] = 0.1
    """Length of the weights' average, as its standard deviation relative to the training so far (arXiv 2312.02696)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile, on GPUs only: torch 2.13 was found to compile wrong gradients of UNets for CPUs."""
    log_every: Positive = 10
    """Steps between log lines; only there does the loop wait for the device."""
    checkpoint_every: Positive = 1000
    keep_checkpoints: Positive = 2
    validate_every: Positive = 1000
    """Steps between validations and pictures to look at."""
    validate_first: bool = False
    """Validate before the first step, too: to compare with, and to see at once that it works."""


class TrainVAESection(TrainSection):
    """Training of the autoencoder: reconstruction + KL + perceptual + adversarial (arXiv 2112.10752, appendix G)."""

    reconstruction: Literal["l1", "l2"] = "l1"
    kl_weight: NonNegative = 1e-6
    perceptual_weight: NonNegative = 1.0
    perceptual_weights: str | None = None
    """LPIPS weights as safetensors; without them a multi-scale structural term takes its place."""
    learn_variance: bool = True
    """Learn the decoder's variance, one number for all pixels."""
    adversarial_weight: NonNegative = 0.5
    """Of the PatchGAN, times the adaptive weight; 0 leaves it out."""
    adversarial_start: Count = 50_001
    """Step from which the discriminator takes part."""
    discriminator_width: Positive = 64
    discriminator_layers: Positive = 3
    discriminator_learning_rate: PositiveFloat = 1e-4


class TrainLatentSection(TrainSection):
    """Training of the UNet, and of the text encoder with it where `text_encoder.train` says so."""

    cache: bool = True
    """Encode every picture, and every caption where the text encoder is frozen, once and before training."""
    text_learning_rate: PositiveFloat | None = None
    """Of the text encoder; None: the same."""


class ValidationSection(Section):
    """What is measured and drawn on the way."""

    num_pictures: Positive = 512
    """Held-out pictures, at most."""
    batch_size: Positive = 32
    timestep_bands: Positive = 10
    """Equal ranges of timesteps whose losses are told apart; each picture is measured once in each."""
    prompts: tuple[str, ...] = ()
    """Drawn at every validation, with fixed noise; empty takes the first held-out captions."""
    sampler: str = SAMPLING.sampler
    num_steps: Positive = SAMPLING.num_steps
    guidance_scale: NonNegative = SAMPLING.guidance_scale

    def sampling(self) -> SamplingSettings:
        """How to sample the prompts."""
        return SamplingSettings(sampler=self.sampler, num_steps=self.num_steps, guidance_scale=self.guidance_scale)
