"""The sections of a run's configuration: every setting with its default, meaning and unit."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from text_encoder import TextEncoderConfig
from unet import UNetConfig, UNetError
from unet.config import MAX_HISTORY
from unet.experts import band_edges
from vae import VAEConfig

from ..diffusion.process import Prediction, Process, Variance, Weighting
from ..diffusion.schedule import Schedule
from ..sampling.settings import SamplingSettings
from .values import Color, Count, Decay, Fraction, NonNegative, PathText, Positive, PositiveFloat, number

SAMPLING = SamplingSettings()  # the defaults


class Section(BaseModel):
    """Base of all sections: immutable, with no unknown keys and no implicit type conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class DataConfig(Section):
    """Where the pictures are and how they are turned into pixels."""

    source: PathText = "builtin:emoji-mini"
    """Folder, Parquet or tar files (one or a glob), a dataset on the Hugging Face Hub, or `builtin:emoji-mini`."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str = "validation"
    """Split that is never trained on; if there is none, `validation_share` of the pictures are held out."""
    validation_share: Annotated[float, BeforeValidator(number), Field(gt=0, lt=1)] = 0.05
    """Fraction of the pictures held out if the source has no validation split."""
    image_column: str | None = None
    """Column with the pictures; None: detected."""
    caption_columns: tuple[str, ...] = ()
    """Columns with captions, one of which is chosen at random each time; empty: detected."""
    image_size: Annotated[int, Field(ge=8, le=4096)] = 256
    """Width and height in pixels: the shorter side is resized to it, then the picture is center-cropped."""
    min_size: Positive | None = None
    """Pictures whose shorter side has fewer pixels are rejected; None: image_size."""
    max_pixels: Positive = 64_000_000
    """Pictures with more pixels (width times height) are rejected before they are decoded."""
    background: Color = (255, 255, 255)
    """Background of transparent pictures: red, green, blue."""
    flip: bool = True
    """Flip pictures horizontally with probability 0.5."""
    quarantine: PathText | None = None
    """File with names of pictures to exclude, as written by `latentdiff data check`."""
    max_broken: Fraction = 0.01
    """Fraction of broken pictures above which the run stops."""


class ModelSection(Section):
    """A new model, or a pretrained one, whose sizes are its own and are therefore not recorded."""

    pretrained: PathText | None = None
    also_used: ClassVar[tuple[str, ...]] = ()  # settings other than sizes, which apply to a pretrained model too

    def brings_sizes(self) -> bool:
        """Whether the weights come from a trained model, whose sizes are its own."""
        return self.pretrained is not None

    def sizes(self) -> dict[str, Any]:
        """Return the settings that a pretrained model brings along."""
        others = {"pretrained", *self.also_used}
        return {name: getattr(self, name) for name in type(self).model_fields if name not in others}

    @model_serializer(mode="wrap")
    def _serialize(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        kept = {"pretrained", *self.also_used} if self.brings_sizes() else set(type(self).model_fields)
        return {name: value for name, value in serialize(self).items() if name in kept}


class VAESection(ModelSection):
    """Shape of the autoencoder (see vae/config.py); f = 2 ** (levels - 1)."""

    pretrained: PathText | None = None
    """Folder of a trained VAE to use as is, or `builtin:emoji-256`, or `builtin:emoji-64` for 64 px; train_vae and the
    sizes are then ignored."""
    block_out_channels: tuple[Positive, ...] = (128, 256, 512, 512)
    layers_per_block: Positive = 2
    latent_channels: Positive = 4
    attention_levels: tuple[Count, ...] = ()
    mid_attention: bool = True
    norm_groups: Positive = 32

    def build(self, image_size: int) -> VAEConfig:
        """Return the config of a new VAE."""
        return VAEConfig(**self.sizes(), scale_factor=1.0, sample_size=image_size)


class TextEncoderSection(ModelSection):
    """The text encoder: a new BERT with a vocabulary learned from the captions, or a pretrained one."""

    pretrained: PathText | None = None
    """Folder or Hugging Face Hub name of a BERT, or `builtin:emoji-256`; only `train` and `max_length` then apply."""
    also_used: ClassVar[tuple[str, ...]] = ("train", "max_length")
    train: bool = True
    """Train it with the UNet; if it is frozen, text features can be cached."""
    width: Positive = 256
    num_layers: Positive = 4
    num_heads: Positive = 4
    vocab_size: Positive = 8192
    """Maximum size of the vocabulary."""
    max_length: Annotated[int, Field(ge=3, le=512)] = 77
    """Maximum number of tokens of a prompt, including [CLS] and [SEP]."""

    def build(self) -> TextEncoderConfig:
        """Return the config of a new BERT."""
        return TextEncoderConfig(self.width, self.num_layers, self.num_heads)


def _several(experts: Any) -> Any:
    return None if experts == 1 else experts  # one and the same thing, to resume with either


class UNetSection(ModelSection):
    """Shape of the UNet (see unet/config.py); its channels and context width follow from the VAE and text encoder."""

    pretrained: PathText | None = None
    """Folder of a trained UNet to start from, or `builtin:emoji-256`; the sizes below are then ignored."""
    also_used: ClassVar[tuple[str, ...]] = ("attention", "experts", "experts_from", "trajectory_attention")
    experts: Annotated[int | tuple[int, ...] | None, AfterValidator(_several)] = None
    """Number of UNets, each for an equal band of timesteps, or the timesteps where one takes over from another, such as
    [250, 500]; None: a single one."""
    experts_from: PathText | None = None
    """Folder of a trained UNet from which all experts start, as for `pretrained`; the sizes below are then ignored."""
    block_out_channels: tuple[Positive, ...] = (320, 640, 1280, 1280)
    layers_per_block: Positive = 2
    attention_levels: tuple[Count, ...] = (0, 1, 2)
    num_heads: Positive | tuple[Positive, ...] | None = None
    """Attention heads, one number or one per level; None: width / 64."""
    transformer_layers: Positive = 1
    linear_projection: bool = False
    norm_groups: Positive = 32
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Backend of the attention layers; `xformers` needs an NVIDIA GPU and `pip install 'latentdiff[xformers]'`."""
    trajectory_attention: Annotated[int, Field(ge=0, le=MAX_HISTORY)] = 0
    """K, the earlier steps of a trajectory that every step attends to (docs/trajectory.md); 0: none. A pretrained UNet
    without gets new layers, and one that has them keeps its own number."""

    def brings_sizes(self) -> bool:
        """See `ModelSection`; `experts_from` brings them along, too."""
        return self.pretrained is not None or self.experts_from is not None

    def edges(self, num_timesteps: int) -> tuple[int, ...] | None:
        """Return the edges 0, ..., T of the experts' bands; None for a single UNet. Raises UNetError."""
        if self.experts_from is not None and (self.experts is None or self.pretrained is not None):
            raise UNetError(f"experts_from={self.experts_from}: needs `experts`, and takes the place of `pretrained`")
        if self.experts is not None and self.trajectory_attention:
            raise UNetError(f"experts={self.experts} with trajectory_attention={self.trajectory_attention}: an expert "
                            "cannot look back at what another one has computed")  # fmt: skip
        return None if self.experts is None else band_edges(self.experts, num_timesteps)

    def build(self, latent_channels: int, context_dim: int, sample_size: int) -> UNetConfig:
        """Return the config of a new UNet."""
        return UNetConfig(**self.sizes(), in_channels=latent_channels, out_channels=latent_channels,
                          context_dim=context_dim, sample_size=sample_size,
                          trajectory_attention=self.trajectory_attention)  # fmt: skip


class DiffusionSection(Section):
    """The noise schedule and the loss (see latentdiff/diffusion/)."""

    schedule: str = "scaled_linear"
    """Noise schedule: `linear`, `scaled_linear` (linear in the square root of beta, as in LDM) or `cosine`."""
    num_timesteps: Annotated[int, Field(ge=2)] = 1000
    """T, the number of noise levels."""
    beta_start: PositiveFloat | None = None
    """Noise variance of the first step; None: the usual value of the schedule (`cosine` has none)."""
    beta_end: PositiveFloat | None = None
    """Noise variance of the last step, likewise."""
    zero_terminal_snr: bool = False
    """Make the last timestep pure noise (arXiv 2305.08891); prompts then take longer to learn (docs/recipes.md)."""
    prediction: Prediction = "v"
    """Velocity `v`, noise `eps`, clean latents `x0`, or the `mean` of the reverse step, not with `simple`."""
    weighting: Weighting = "simple"
    """`min_snr` denoises better at low noise but learns prompts later (docs/recipes.md)."""
    min_snr_gamma: PositiveFloat = 5.0
    """Signal-to-noise ratio at which `min_snr` clips the weight (arXiv 2303.09556)."""
    variance: Variance = "beta"
    """Variance of the reverse step, used by the `elbo` weighting."""
    caption_dropout: Fraction = 0.1
    """Fraction of captions replaced by the empty prompt, for classifier-free guidance."""

    def build(self) -> Schedule:
        """Return the noise schedule."""
        return Schedule.named(self.schedule, self.num_timesteps, beta_start=self.beta_start, beta_end=self.beta_end,
                              zero_terminal_snr=self.zero_terminal_snr)  # fmt: skip

    def process(self) -> Process:
        """Return the schedule together with the prediction type."""
        return Process(self.build(), self.prediction)


class TrainSection(Section):
    """Settings of both training stages. A step is one optimizer update."""

    steps: Positive = 100_000
    """Number of steps; under a budget, only what `warmup_steps` and `adversarial_start` are shares of."""
    max_steps: Positive | None = None
    """Most steps under a budget; `steps` given on the command line sets it."""
    batch_size: Positive = 32
    """Pictures per step, over all processes."""
    micro_batch_size: Positive | None = None
    """Pictures per forward pass and process; gradients are accumulated over the batch. None: all at once."""
    learning_rate: PositiveFloat = 1e-4
    """AdamW's learning rate at the end of the warm-up."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After warmup: constant, or cosine decay to `final_lr` at the last step. Under a budget: constant, then linear
    decay over the last quarter."""
    final_lr: NonNegative = 0.0
    """Learning rate at the end of the decay."""
    warmup_steps: Count = 500
    """Steps over which the learning rate rises linearly to its value; under a budget, the same share of its steps."""
    weight_decay: NonNegative = 0.01
    """AdamW's decay of the weights per step, as a multiple of the learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Decay rates of AdamW's first and second moments."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    max_skipped: Positive = 20
    """The run saves and stops after this many consecutive steps with a loss that is not finite."""
    max_spike: Annotated[float, BeforeValidator(number), Field(gt=1)] | None = None
    """Skip steps whose loss is more than this many times its running mean; None: only note those beyond 1,000 times."""
    ema_sigma_rel: Annotated[float, BeforeValidator(number), Field(gt=0, le=0.28)] = 0.1
    """Width of the EMA of the weights: its standard deviation relative to the training so far (arXiv 2312.02696)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, but about a third slower."""
    compile: bool = False
    """Use torch.compile; GPUs only, because torch 2.13 was found to compile wrong UNet gradients on CPUs."""
    cuda_graph: bool = True
    """Record forward and backward passes as a CUDA graph where the GPU would wait for its host: on one NVIDIA GPU,
    without `compile`, if a step takes less than a third of its memory."""
    log_every: Positive = 10
    """Steps between log lines; only then does the loop synchronize with the device."""
    checkpoint_every: Positive = 1000
    """Steps between checkpoints."""
    keep_checkpoints: Positive = 2
    """Checkpoints to keep; older ones are deleted."""
    validate_every: Positive = 1000
    """Steps between validations, which also write sample pictures."""
    validate_first: bool = False
    """Also validate before the first step: it gives a baseline, and reveals errors at once."""


class TrainVAESection(TrainSection):
    """Training of the VAE: reconstruction, KL, perceptual and adversarial losses (arXiv 2112.10752, appendix G)."""

    reconstruction: Literal["l1", "l2"] = "l1"
    """Error of the pixels: absolute (Laplace likelihood) or squared (Gaussian likelihood)."""
    kl_weight: NonNegative = 1e-6
    """Weight of the KL divergence, which is summed over the latents and divided by the number of pixel values."""
    perceptual_weight: NonNegative = 1.0
    """Weight of the perceptual term; 0 leaves it out."""
    perceptual_weights: PathText | None = None
    """LPIPS weights as a safetensors file; without them, a multi-scale structural loss takes its place."""
    learn_variance: bool = True
    """Learn the decoder's variance, a single number for all pixels."""
    adversarial_weight: NonNegative = 0.5
    """Weight of the PatchGAN loss, times the adaptive weight; 0 disables the discriminator."""
    adversarial_start: Count = 50_001
    """First step with the discriminator; under a budget, the same share of its steps."""
    discriminator_width: Positive = 64
    """Channels of its first layer."""
    discriminator_layers: Positive = 3
    """Number of layers that halve the resolution."""
    discriminator_learning_rate: PositiveFloat = 1e-4


class TrainLatentSection(TrainSection):
    """Training of the UNet, together with the text encoder if `text_encoder.train` is set."""

    cache: bool = True
    """Encode every picture (and, with a frozen text encoder, every caption) once before training."""
    evaluate_every: Count = 0
    """Steps between evaluations of how many samples show what was asked for, beside a validation; 0: none."""
    keep_best: bool = True
    """Keep the EMA with the lowest held-out loss without captions in `model-best/`, beside the last one."""
    ema_snapshots: Count = 0
    """Snapshots to keep, 8 bytes per weight each; from 24, `latentdiff ema` makes EMAs of widths 0.023 to 0.25."""
    text_learning_rate: PositiveFloat | None = None
    """Learning rate of the text encoder; None: the same as `learning_rate`."""


class ValidationSection(Section):
    """What is measured and sampled during training."""

    num_pictures: Positive = 512
    """Maximum number of held-out pictures."""
    batch_size: Positive = 32
    timestep_bands: Positive = 10
    """Number of equal timestep ranges whose losses are reported separately; each picture is measured once in each."""
    prompts: tuple[str, ...] = ()
    """Prompts to sample at every validation, with fixed noise; empty: the first held-out captions."""
    sampler: str = SAMPLING.sampler
    num_steps: Positive = SAMPLING.num_steps
    guidance_scale: NonNegative = SAMPLING.guidance_scale

    def sampling(self) -> SamplingSettings:
        """Return the settings for sampling the prompts."""
        return SamplingSettings(sampler=self.sampler, num_steps=self.num_steps, guidance_scale=self.guidance_scale)
