"""The layers that UNet3DConditionModel is made of.

Videos stay [B, F, H, W, C] throughout, so that a mesh may shard them along their frames. Text keys and values are
computed once a video, not once a frame.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.models.attention import attention
from vpo_jax.models.layers import (
    Conv,
    Dense,
    GroupNorm,
    LayerNorm,
    activation,
    adapter,
    default_kernel_init,
    multiply,
)
from vpo_jax.models.unet3d_config import UNet3DConfig
from vpo_jax.runtime.mesh import ROWS, VIDEO, constrain
from vpo_jax.runtime.types import DType

_TRANSFORMER_NORM_EPS = 1e-6  # Transformer2DModel and TransformerTemporalModel
_TEMPORAL_CONV_EPS = 1e-5  # TemporalConvLayer, whatever norm_eps says


@dataclasses.dataclass(frozen=True)
class Compute:
    """How to compute, as opposed to what: nothing here changes a parameter."""

    dtype: DType = jnp.float32
    attention_backend: str = "xla"
    remat: bool = False
    lora_scale: float = 1.0

    def dense(self, features: int, name: str, use_bias: bool = True) -> Dense:
        return Dense(features, use_bias, dtype=self.dtype, lora_scale=self.lora_scale, name=name)

    def conv(self, features: int, name: str, kernel: int = 3, stride: int = 1, padding: Any = 1) -> Conv:
        return Conv(
            features, (kernel,) * 2, (stride,) * 2, padding, dtype=self.dtype, lora_scale=self.lora_scale, name=name
        )

    def layer_norm(self, name: str) -> LayerNorm:
        return LayerNorm(dtype=self.dtype, name=name)


def resize_nearest(x: jax.Array, height: int, width: int) -> jax.Array:
    """Nearest neighbour on [B, F, H, W, C]; a plain repeat where the size doubles."""
    rows = np.arange(height) * x.shape[2] // height
    columns = np.arange(width) * x.shape[3] // width
    if (height, width) == (2 * x.shape[2], 2 * x.shape[3]):
        return x.repeat(2, 2).repeat(2, 3)
    return x[:, :, rows][:, :, :, columns]


class TimestepEmbedding(nn.Module):
    """Two dense layers from sinusoids to the embedding that every residual block reads."""

    features: int
    act_fn: str
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = activation(self.act_fn)(self.compute.dense(self.features, "linear_1")(x))
        return self.compute.dense(self.features, "linear_2")(x)


class ResnetBlock2D(nn.Module):
    """Two per-frame convolutions with the time embedding between them; output (shortcut + residual) / scale."""

    features: int
    config: UNet3DConfig
    compute: Compute
    output_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
        cfg, compute = self.config, self.compute
        act = activation(cfg.act_fn)
        norm = partial(GroupNorm, cfg.norm_num_groups, cfg.norm_eps, compute.dtype, batch_axes=2)
        y = norm(name="norm1")(x)
        y = compute.conv(self.features, "conv1")(act(y))
        y = y + compute.dense(self.features, "time_emb_proj")(act(embedding))[:, None, None, None]
        y = norm(name="norm2")(y)
        y = compute.conv(self.features, "conv2")(act(y))
        if x.shape[-1] != self.features:
            x = compute.conv(self.features, "conv_shortcut", kernel=1, padding=0)(x)
        return (x + y) / self.output_scale


class TemporalConv(nn.Module):
    """Convolution over three neighbouring frames at each position, zero padded; kernel [3, 1, 1, C, C'].

    Written as one matrix product over the three frames side by side: XLA runs that three times faster on a CPU
    than the same convolution, and on a GPU or TPU it is the shape that the matrix units want.
    """

    features: int
    compute: Compute
    zero: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, dtype = x.shape[-1], self.compute.dtype
        init = nn.initializers.zeros if self.zero else default_kernel_init
        kernel = self.param("kernel", init, (3, 1, 1, channels, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        padded = jnp.pad(x.astype(dtype), ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        frames = x.shape[1]
        window = jnp.concatenate([padded[:, i : i + frames] for i in range(3)], -1)  # [B, F, H, W, 3C]
        y = multiply(window, kernel.astype(dtype).reshape(3 * channels, self.features))
        if self.has_variable("lora", "lora_A"):
            down, up = adapter(self, dtype)  # [3, 1, 1, C, r], [r, C']
            y = y + self.compute.lora_scale * ((window @ down.reshape(3 * channels, -1)) @ up)
        return y + bias.astype(dtype)


class NormActConv(nn.Module):
    """GroupNorm over all frames, SiLU, a temporal convolution: torch's Sequential, whose dropout moves the index."""

    num_groups: int
    conv_name: str
    compute: Compute
    zero: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.silu(GroupNorm(self.num_groups, _TEMPORAL_CONV_EPS, self.compute.dtype, name="0")(x))
        return TemporalConv(x.shape[-1], self.compute, self.zero, name=self.conv_name)(y)


class TemporalConvLayer(nn.Module):
    """Four temporal convolutions and a residual; the last starts at zero. Dropout is left out: DPO runs without."""

    config: UNet3DConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for i in (1, 2, 3, 4):
            conv_name = "2" if i == 1 else "3"
            y = NormActConv(self.config.norm_num_groups, conv_name, self.compute, zero=i == 4, name=f"conv{i}")(y)
        return x + y


class Attention(nn.Module):
    """Multi-head attention of [..., Q, C] over itself or over a context [..., K, D]."""

    heads: int
    head_dim: int
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        context = x if context is None else context
        inner = self.heads * self.head_dim
        split = lambda y: y.reshape(*y.shape[:-1], self.heads, self.head_dim)  # noqa: E731
        query = split(self.compute.dense(inner, "to_q", use_bias=False)(x))
        key = split(self.compute.dense(inner, "to_k", use_bias=False)(context))
        value = split(self.compute.dense(inner, "to_v", use_bias=False)(context))
        y = attention(query, key, value, backend=self.compute.attention_backend)
        return self.compute.dense(x.shape[-1], "to_out.0")(y.reshape(*x.shape[:-1], inner))


class FeedForward(nn.Module):
    """GEGLU of inner size 4C, then a projection back."""

    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        hidden, gate = jnp.split(self.compute.dense(8 * channels, "net.0.proj")(x), 2, axis=-1)
        return self.compute.dense(channels, "net.2")(hidden * nn.gelu(gate, approximate=False))


class Transformer2DModel(nn.Module):
    """Spatial transformer: self-attention within a frame, cross-attention to the text, feed-forward."""

    heads: int
    config: UNet3DConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
        cfg, compute = self.config, self.compute
        batch, frames, height, width, channels = x.shape
        inner = self.heads * cfg.attention_head_dim
        y = GroupNorm(cfg.norm_num_groups, _TRANSFORMER_NORM_EPS, compute.dtype, batch_axes=2, name="norm")(x)
        y = compute.dense(inner, "proj_in")(y).reshape(batch, frames, height * width, inner)
        y = SpatialBlock(self.heads, cfg.attention_head_dim, compute, name="transformer_blocks.0")(y, text)
        y = compute.dense(channels, "proj_out")(y.reshape(batch, frames, height, width, inner))
        return x + y


class SpatialBlock(nn.Module):
    """BasicTransformerBlock on [B, F, H*W, C] with text [B, L, D]."""

    heads: int
    head_dim: int
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
        compute = self.compute
        x = x + Attention(self.heads, self.head_dim, compute, name="attn1")(compute.layer_norm("norm1")(x))
        y = compute.layer_norm("norm2")(x)
        y = y.reshape(x.shape[0], -1, x.shape[-1])  # all positions of a video attend to the same text
        y = Attention(self.heads, self.head_dim, compute, name="attn2")(y, text)
        x = x + y.reshape(x.shape)
        return x + FeedForward(compute, name="ff")(compute.layer_norm("norm3")(x))


class TransformerTemporalModel(nn.Module):
    """Temporal transformer: each position attends over the frames, twice; no positions, no text."""

    heads: int
    config: UNet3DConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, compute = self.config, self.compute
        batch, frames, height, width, channels = x.shape
        inner = self.heads * cfg.attention_head_dim
        y = GroupNorm(cfg.norm_num_groups, _TRANSFORMER_NORM_EPS, compute.dtype, name="norm")(x)
        # Positions of all videos as one axis: with two sharded axes XLA's partitioner computed wrong gradients.
        y = y.reshape(batch, frames, height * width, channels).swapaxes(1, 2)
        y = constrain(y.reshape(-1, frames, channels), ROWS)
        y = compute.dense(inner, "proj_in")(y)
        y = TemporalBlock(self.heads, cfg.attention_head_dim, compute, name="transformer_blocks.0")(y)
        y = compute.dense(channels, "proj_out")(y)
        y = y.reshape(batch, height * width, frames, channels).swapaxes(1, 2)
        return x + constrain(y.reshape(x.shape), VIDEO)


class TemporalBlock(nn.Module):
    """BasicTransformerBlock with two self-attentions, on [B*H*W, F, C]."""

    heads: int
    head_dim: int
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        compute = self.compute
        x = x + Attention(self.heads, self.head_dim, compute, name="attn1")(compute.layer_norm("norm1")(x))
        x = x + Attention(self.heads, self.head_dim, compute, name="attn2")(compute.layer_norm("norm2")(x))
        return x + FeedForward(compute, name="ff")(compute.layer_norm("norm3")(x))
