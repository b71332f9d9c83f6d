"""UNet3DConditionModel of diffusers in Flax: the denoiser of ModelScope, ZeroScope and VideoCrafter2."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpo_jax.models.attention import BACKENDS
from vpo_jax.models.layers import GroupNorm, timestep_embedding
from vpo_jax.models.unet3d_config import UNet3DConfig
from vpo_jax.models.unet3d_layers import (
    Compute,
    ResnetBlock2D,
    TemporalConvLayer,
    TimestepEmbedding,
    Transformer2DModel,
    TransformerTemporalModel,
    resize_nearest,
)
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import VIDEO, constrain
from vpo_jax.runtime.types import DType

__all__ = ["UNet3DConditionModel", "UNet3DConfig"]


class _Layers(nn.Module):
    """What the down, mid and up blocks share: one place for a layer's parts, their names and rematerialisation."""

    features: int
    config: UNet3DConfig
    compute: Compute

    def part(self, module: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        wrapped = nn.remat(module) if self.compute.remat else module
        return wrapped(*args, config=self.config, compute=self.compute, **kwargs)

    def convolve(self, i: int, x: jax.Array, embedding: jax.Array, output_scale: float = 1.0) -> jax.Array:
        x = self.part(ResnetBlock2D, self.features, output_scale=output_scale, name=f"resnets.{i}")(x, embedding)
        return self.part(TemporalConvLayer, name=f"temp_convs.{i}")(constrain(x, VIDEO))

    def attend(self, i: int, x: jax.Array, text: jax.Array) -> jax.Array:
        heads = self.features // self.config.attention_head_dim
        x = self.part(Transformer2DModel, heads, name=f"attentions.{i}")(x, text)
        return self.part(TransformerTemporalModel, heads, name=f"temp_attentions.{i}")(x)


class DownBlock3D(_Layers):
    """`layers_per_block` layers, with attention or without, then an optional halving of height and width."""

    attend_text: bool = False
    downsample: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, text: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        skips = []
        for i in range(self.config.layers_per_block):
            x = self.convolve(i, x, embedding)
            if self.attend_text:
                x = self.attend(i, x, text)
            skips.append(x)
        if self.downsample:
            pad = self.config.downsample_padding
            padding = ((0, 1), (0, 1)) if pad == 0 else pad  # diffusers pads low by hand where the padding is 0
            x = self.compute.conv(self.features, "downsamplers.0.conv", stride=2, padding=padding)(x)
            skips.append(x)
        return x, skips


class MidBlock3D(_Layers):
    """Layer, attention, layer."""

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, text: jax.Array) -> jax.Array:
        scale = self.config.mid_block_scale_factor
        x = self.convolve(0, x, embedding, scale)
        x = self.attend(0, x, text)
        return self.convolve(1, x, embedding, scale)


class UpBlock3D(_Layers):
    """`layers_per_block` + 1 layers that each read a skip, then an optional resize to the next skip's size."""

    attend_text: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        skips: list[jax.Array],
        embedding: jax.Array,
        text: jax.Array,
        size: tuple[int, int] | None,
    ) -> jax.Array:
        for i, skip in enumerate(reversed(skips)):
            x = self.convolve(i, jnp.concatenate([x, skip], -1), embedding)
            if self.attend_text:
                x = self.attend(i, x, text)
        if size is not None:
            x = resize_nearest(x, *size)
            x = self.compute.conv(self.features, "upsamplers.0.conv")(x)
        return x


class UNet3DConditionModel(nn.Module):
    """Text-conditioned denoiser of videos, the Flax twin of diffusers' class of this name.

    Attributes:
      config: the architecture.
      dtype: of the computation; parameters are float32 or what the tree holds.
      attention_backend: a name in `vpo_jax.models.attention.BACKENDS`.
      remat: recompute activations in the backward pass, layer by layer.
      lora_scale: alpha / rank of the adapters in the `lora` collection, where there are any.
    """

    config: UNet3DConfig
    dtype: DType = jnp.float32
    attention_backend: str = "xla"
    remat: bool = False
    lora_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        sample: jax.Array,
        timesteps: jax.Array,
        encoder_hidden_states: jax.Array,
        fps: jax.Array | float | None = None,
    ) -> jax.Array:
        """The model's prediction for noisy latents.

        Args:
          sample: [B, F, h, w, in_channels]; any h and w that survive the stages' halvings.
          timesteps: [B] or a scalar, integer or float.
          encoder_hidden_states: [B, L, cross_attention_dim].
          fps: frames a second, [B] or a scalar, where the config has `fps_cond`; None takes the config's.

        Returns:
          [B, F, h, w, out_channels] in float32.
        """
        if self.attention_backend not in BACKENDS:
            raise UserError(
                f"attention_backend: unknown backend {self.attention_backend!r}; known: {', '.join(BACKENDS)}"
            )
        cfg = self.config
        compute = Compute(self.dtype, self.attention_backend, self.remat, self.lora_scale)
        timesteps = jnp.broadcast_to(timesteps, (sample.shape[0],))
        text = encoder_hidden_states.astype(self.dtype)
        first = cfg.block_out_channels[0]

        embedding = timestep_embedding(timesteps, first)
        embedding = TimestepEmbedding(4 * first, cfg.act_fn, compute, name="time_embedding")(embedding)
        if cfg.fps_cond:
            rate = jnp.broadcast_to(jnp.asarray(cfg.fps if fps is None else fps), timesteps.shape)
            rates = TimestepEmbedding(4 * first, "silu", compute, name="fps_embedding")
            embedding = embedding + rates(timestep_embedding(rate, first))

        x = compute.conv(first, "conv_in")(constrain(sample.astype(self.dtype), VIDEO))
        x = TransformerTemporalModel(8, cfg, compute, name="transformer_in")(x)

        skips = [x]
        last = len(cfg.block_out_channels) - 1
        for i, (kind, features) in enumerate(zip(cfg.down_block_types, cfg.block_out_channels, strict=True)):
            down_block = DownBlock3D(
                features, cfg, compute, kind == "CrossAttnDownBlock3D", downsample=i < last, name=f"down_blocks.{i}"
            )
            x, new = down_block(x, embedding, text)
            skips += new

        x = MidBlock3D(cfg.block_out_channels[-1], cfg, compute, name="mid_block")(x, embedding, text)

        layers = cfg.layers_per_block + 1
        for i, (kind, features) in enumerate(zip(cfg.up_block_types, reversed(cfg.block_out_channels), strict=True)):
            skips, mine = skips[:-layers], skips[-layers:]
            size = (skips[-1].shape[2], skips[-1].shape[3]) if i < last else None
            up_block = UpBlock3D(features, cfg, compute, kind == "CrossAttnUpBlock3D", name=f"up_blocks.{i}")
            x = up_block(x, mine, embedding, text, size)

        x = GroupNorm(cfg.norm_num_groups, cfg.norm_eps, self.dtype, batch_axes=2, name="conv_norm_out")(x)
        return compute.conv(cfg.out_channels, "conv_out")(nn.silu(x)).astype(jnp.float32)
