"""The image autoencoder of Stable Diffusion (diffusers `AutoencoderKL`) in Flax linen, channel-last.

Module names are torch's dotted names, so a parameter's path joined with "." is its key in the checkpoint.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpo_jax.models.attention import attention
from vpo_jax.models.config_fields import MOST_BLOCKS, read_fields, require, require_int, require_positive
from vpo_jax.models.layers import Conv, Dense, GroupNorm, activation
from vpo_jax.runtime.types import DType

# diffusers fixes it for every norm of the encoder and the decoder, whatever the config says
_NORM_EPSILON = 1e-6
_DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
_UP_BLOCKS = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
_ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig:
    """The fields of diffusers' vae/config.json, with the defaults of the torch class.

    `sample_size` and `force_upcast` are carried for diffusers and change nothing here: the torch class
    reads the first for tiling only, and the second is read by other pipelines than text-to-video.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    original: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "AutoencoderKLConfig":
        """The config from a parsed vae/config.json.

        Raises:
            UserError: a field or value that this port does not honour, by name.
        """
        config = cls(**read_fields(cls, raw, "vae"), original=dict(raw))
        _check(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """What goes back into vae/config.json: the dict that was read, or every field of a config made by hand."""
        if self.original:
            return dict(self.original)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "original"}
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {"_class_name": "AutoencoderKL", **listed}

    @property
    def scale_factor(self) -> int:
        """How many pixels a latent spans in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)


def _check(config: AutoencoderKLConfig) -> None:
    require_int("vae", config, ("in_channels", "out_channels", "layers_per_block", "latent_channels"))
    require_int("vae", config, ("norm_num_groups",))
    blocks = len(config.block_out_channels)
    for name, allowed in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
        types = getattr(config, name)
        require(len(types) == blocks, f"vae.{name}", f"needs as many entries as block_out_channels ({blocks})")
        for kind in types:
            require(kind in allowed, f"vae.{name}", f"{kind!r} is not supported; use one of {', '.join(allowed)}")
    require(0 < blocks <= MOST_BLOCKS, "vae.block_out_channels", f"needs 1 to {MOST_BLOCKS} entries")
    require_positive("vae", config, ("scaling_factor",))
    for channels in config.block_out_channels:
        require(channels > 0, "vae.block_out_channels", f"{channels} is no number of channels")
        divides = channels % config.norm_num_groups == 0
        require(divides, "vae.norm_num_groups", f"{config.norm_num_groups} does not divide {channels} channels")
    act_fn = str(config.act_fn).lower()
    require(act_fn in _ACTIVATIONS, "vae.act_fn", f"{config.act_fn!r} is not one of {', '.join(_ACTIVATIONS)}")
    # diffusers' text-to-video pipeline ignores these three, so a model that needs them would decode wrongly there
    require(not config.shift_factor, "vae.shift_factor", "shifted latents are not supported; use null")
    require(config.latents_mean is None, "vae.latents_mean", "per-channel statistics are not supported; use null")
    require(config.latents_std is None, "vae.latents_std", "per-channel statistics are not supported; use null")


class Resnet(nn.Module):
    """Two normalised 3x3 convolutions and a shortcut (diffusers `ResnetBlock2D` without time embedding)."""

    features: int
    config: AutoencoderKLConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [N, H, W, C] -> [N, H, W, features]
        activate = activation(self.config.act_fn.lower())
        groups = self.config.norm_num_groups
        h = activate(GroupNorm(groups, _NORM_EPSILON, dtype=self.dtype, name="norm1")(x))
        h = Conv(self.features, (3, 3), padding=1, dtype=self.dtype, name="conv1")(h)
        h = activate(GroupNorm(groups, _NORM_EPSILON, dtype=self.dtype, name="norm2")(h))
        h = Conv(self.features, (3, 3), padding=1, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = Conv(self.features, (1, 1), padding=0, dtype=self.dtype, name="conv_shortcut")(x)
        return x + h


class PixelAttention(nn.Module):
    """Self-attention over all pixels with one head as wide as the channels."""

    config: AutoencoderKLConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [N, H, W, C] -> the same
        n, height, width, channels = x.shape
        h = GroupNorm(self.config.norm_num_groups, _NORM_EPSILON, dtype=self.dtype, name="group_norm")(x)
        h = h.reshape(n, height * width, channels)
        query, key, value = (
            Dense(channels, dtype=self.dtype, name=name)(h)[:, :, None]  # [N, H*W, 1, C]
            for name in ("to_q", "to_k", "to_v")
        )
        h = attention(query, key, value)[:, :, 0]
        h = Dense(channels, dtype=self.dtype, name="to_out.0")(h)
        return x + h.reshape(x.shape)


class Down(nn.Module):
    """Resnets, each followed by attention where asked, then a strided convolution."""

    features: int
    with_attention: bool
    downsample: bool
    config: AutoencoderKLConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.config.layers_per_block):
            x = Resnet(self.features, self.config, self.dtype, name=f"resnets.{i}")(x)
            if self.with_attention:
                x = PixelAttention(self.config, self.dtype, name=f"attentions.{i}")(x)
        return Downsample(self.features, self.dtype, name="downsamplers.0")(x) if self.downsample else x


class Up(nn.Module):
    """Resnets, each followed by attention where asked, then nearest upsampling and a convolution."""

    features: int
    with_attention: bool
    upsample: bool
    config: AutoencoderKLConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.config.layers_per_block + 1):
            x = Resnet(self.features, self.config, self.dtype, name=f"resnets.{i}")(x)
            if self.with_attention:
                x = PixelAttention(self.config, self.dtype, name=f"attentions.{i}")(x)
        return Upsample(self.features, self.dtype, name="upsamplers.0")(x) if self.upsample else x


class Downsample(nn.Module):
    """Half the height and width; the padding is on the far sides only, as the checkpoints were trained."""

    features: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padding = ((0, 1), (0, 1))
        return Conv(self.features, (3, 3), strides=(2, 2), padding=padding, dtype=self.dtype, name="conv")(x)


class Upsample(nn.Module):
    """Twice the height and width: every pixel repeated, then a 3x3 convolution."""

    features: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, height, width, channels = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (n, height, 2, width, 2, channels))
        x = x.reshape(n, 2 * height, 2 * width, channels)
        return Conv(self.features, (3, 3), padding=1, dtype=self.dtype, name="conv")(x)


class Middle(nn.Module):
    """Resnet, attention unless the config leaves it out, resnet."""

    config: AutoencoderKLConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        x = Resnet(channels, self.config, self.dtype, name="resnets.0")(x)
        if self.config.mid_block_add_attention:
            x = PixelAttention(self.config, self.dtype, name="attentions.0")(x)
        return Resnet(channels, self.config, self.dtype, name="resnets.1")(x)


class Encoder(nn.Module):
    """Images to the mean and log variance of their latents, before `quant_conv`."""

    config: AutoencoderKLConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:  # [N, H, W, 3] -> [N, h, w, 2 Cz]
        config, widths = self.config, self.config.block_out_channels
        x = Conv(widths[0], (3, 3), padding=1, dtype=self.dtype, name="conv_in")(images)
        for i, (kind, width) in enumerate(zip(config.down_block_types, widths, strict=True)):
            last = i == len(widths) - 1
            x = Down(width, kind.startswith("Attn"), not last, config, self.dtype, name=f"down_blocks.{i}")(x)
        x = Middle(config, self.dtype, name="mid_block")(x)
        # SiLU whatever act_fn says: the torch class does the same
        x = nn.silu(GroupNorm(config.norm_num_groups, _NORM_EPSILON, dtype=self.dtype, name="conv_norm_out")(x))
        return Conv(2 * config.latent_channels, (3, 3), padding=1, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents, after `post_quant_conv`, to images."""

    config: AutoencoderKLConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:  # [N, h, w, Cz] -> [N, H, W, 3]
        config, widths = self.config, self.config.block_out_channels[::-1]
        x = Conv(widths[0], (3, 3), padding=1, dtype=self.dtype, name="conv_in")(latents)
        x = Middle(config, self.dtype, name="mid_block")(x)
        for i, (kind, width) in enumerate(zip(config.up_block_types, widths, strict=True)):
            last = i == len(widths) - 1
            x = Up(width, kind.startswith("Attn"), not last, config, self.dtype, name=f"up_blocks.{i}")(x)
        # SiLU whatever act_fn says: the torch class does the same
        x = nn.silu(GroupNorm(config.norm_num_groups, _NORM_EPSILON, dtype=self.dtype, name="conv_norm_out")(x))
        return Conv(config.out_channels, (3, 3), padding=1, dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """Images to latents and back; `scaling_factor` is not applied here, the pipeline does that."""

    config: AutoencoderKLConfig
    dtype: DType = jnp.float32

    def setup(self) -> None:
        channels = self.config.latent_channels
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        if self.config.use_quant_conv:
            self.quant_conv = Conv(2 * channels, (1, 1), padding=0, dtype=self.dtype)
        if self.config.use_post_quant_conv:
            self.post_quant_conv = Conv(channels, (1, 1), padding=0, dtype=self.dtype)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log variance of the latents, each [N, h, w, Cz], of images [N, H, W, 3] in [-1, 1].

        The log variance is clipped to [-30, 20] as in diffusers' `DiagonalGaussianDistribution`.
        """
        moments = self.encoder(images)
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images [N, H, W, 3], about [-1, 1] and not clipped, of latents [N, h, w, Cz]."""
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The reconstruction from the latents' mean: touches every parameter, so `init` makes them all."""
        return self.decode(self.encode(images)[0])
