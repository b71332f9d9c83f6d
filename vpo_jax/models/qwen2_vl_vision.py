"""Qwen2-VL's vision encoder in Flax linen: patches of two frames, rotary rows and columns, four patches a token."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpo_jax.models.attention import attention
from vpo_jax.models.idefics2_vision import VisionFeedForward
from vpo_jax.models.layers import Conv, Dense, LayerNorm, activation
from vpo_jax.models.mistral import rotary_angles, rotate
from vpo_jax.models.qwen2_vl_config import VisionConfig
from vpo_jax.runtime.types import DType

_EPSILON = 1e-6  # of every norm; no field of the config says it


def grid_angles(rows: int, columns: int, head_size: int, theta: float) -> jax.Array:
    """Rotation of the patches of one grid, row by row: float32 [1, rows * columns, head_size / 2].

    Half of a head's pairs of channels turn with the patch's row, the other half with its column.
    """
    row, column = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    angles = [rotary_angles(place.reshape(1, -1), head_size // 2, theta) for place in (row, column)]
    return jnp.concatenate(angles, axis=-1)


class PatchEmbed(nn.Module):
    """Patches of `temporal_patch_size` frames as vectors."""

    config: VisionConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:  # [N, f, H, W, 3] -> [N, t, h, w, C]
        config = self.config
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        return Conv(config.embed_dim, size, size, use_bias=False, dtype=self.dtype, name="proj")(pixels)


class VisionAttention(nn.Module):
    """Multi-head self-attention between the patches of one time, not causal; one product makes q, k and v."""

    config: VisionConfig
    dtype: DType = jnp.float32
    backend: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array) -> jax.Array:  # [N, L, C], [1, L, D / 2]
        config = self.config
        qkv = Dense(3 * config.embed_dim, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(*x.shape[:2], 3, config.num_heads, config.head_size)
        query, key, value = (qkv[:, :, i] for i in range(3))
        y = attention(rotate(query, angles), rotate(key, angles), value, None, self.backend)
        return Dense(config.embed_dim, dtype=self.dtype, name="proj")(y.reshape(x.shape))


class VisionBlock(nn.Module):
    """One pre-norm transformer layer."""

    config: VisionConfig
    dtype: DType = jnp.float32
    backend: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array) -> jax.Array:
        config, dtype = self.config, self.dtype
        h = LayerNorm(_EPSILON, dtype, name="norm1")(x)
        x = x + VisionAttention(config, dtype, self.backend, name="attn")(h, angles)
        h = LayerNorm(_EPSILON, dtype, name="norm2")(x)
        return x + VisionFeedForward(int(config.embed_dim * config.mlp_ratio), config.hidden_act, dtype, name="mlp")(h)


class PatchMerger(nn.Module):
    """Squares of `spatial_merge_size` x `spatial_merge_size` patches to one token of the text's width."""

    config: VisionConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [N, h, w, C] -> [N, h / m * w / m, C_text]
        merge = self.config.spatial_merge_size
        x = LayerNorm(_EPSILON, self.dtype, name="ln_q")(x)
        images, rows, columns, width = x.shape
        x = x.reshape(images, rows // merge, merge, columns // merge, merge, width).swapaxes(2, 3)
        x = x.reshape(images, -1, merge * merge * width)
        x = activation("gelu")(Dense(x.shape[-1], dtype=self.dtype, name="mlp.0")(x))
        return Dense(self.config.hidden_size, dtype=self.dtype, name="mlp.2")(x)


class VisionModel(nn.Module):
    """Videos to tokens of the text; frames of different patches do not see each other."""

    config: VisionConfig
    dtype: DType = jnp.float32
    backend: str = "xla"

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[N, f, H, W, 3] -> [N, t * h * w, C_text], by time, then row, then column.

        f is a multiple of `temporal_patch_size`, H and W are of `factor`.
        """
        config = self.config
        x = PatchEmbed(config, self.dtype, name="patch_embed")(pixels)
        videos, times, rows, columns, width = x.shape
        x = x.reshape(videos * times, rows * columns, width)
        angles = grid_angles(rows, columns, config.head_size, config.rope_theta)
        for i in range(config.depth):
            x = VisionBlock(config, self.dtype, self.backend, name=f"blocks.{i}")(x, angles)
        x = PatchMerger(config, self.dtype, name="merger")(x.reshape(-1, rows, columns, width))
        return x.reshape(videos, -1, x.shape[-1])
