"""Idefics2's vision encoder (a SigLIP for any aspect ratio) and its connector to the text, in Flax linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.models.attention import attention
from vpo_jax.models.idefics2_config import Idefics2Config, PerceiverConfig, VisionConfig
from vpo_jax.models.layers import Conv, Dense, GatedFeedForward, LayerNorm, RMSNorm, activation
from vpo_jax.models.mistral import TokenEmbedding
from vpo_jax.runtime.types import DType


def position_buckets(longest: int, per_side: int) -> np.ndarray:
    """Row n: which of the table's `per_side` places each of n patches along a side gets; int32 [longest + 1, longest].

    A patch's place is the fraction of the image that lies before it, in float32 as transformers computes it: an
    image of any shape is spread over the whole table.
    """
    edges = np.arange(1 / per_side, 1.0, 1 / per_side).astype(np.float32)
    step = np.float32(1.0) / np.maximum(np.arange(longest + 1), 1).astype(np.float32)
    fractions = np.arange(longest, dtype=np.float32)[None, :] * step[:, None]
    fractions = np.minimum(fractions, np.float32(1.0 - 1e-6))
    return np.searchsorted(edges, fractions, side="right").astype(np.int32)


class VisionEmbeddings(nn.Module):
    """Patches as vectors, and where they are."""

    config: VisionConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array, patch_mask: jax.Array | None) -> jax.Array:
        """[N, H, W, 3], bool [N, h, w] or None (every patch is real) -> [N, h * w, C]."""
        config = self.config
        size = (config.patch_size, config.patch_size)
        patches = Conv(config.hidden_size, size, size, dtype=self.dtype, name="patch_embedding")(pixels)
        images, rows, columns, width = patches.shape
        buckets = jnp.asarray(position_buckets(max(rows, columns), config.patches_per_side))
        if patch_mask is None:
            places = buckets[rows, :rows, None] * config.patches_per_side + buckets[columns, None, :columns]
            places = places.reshape(1, -1)
        else:
            high, wide = patch_mask[:, :, 0].sum(1), patch_mask[:, 0, :].sum(1)  # [N], patches of each image
            grid = buckets[high][:, :rows, None] * config.patches_per_side + buckets[wide][:, None, :columns]
            places = jnp.where(patch_mask, grid, 0).reshape(images, -1)
        table = TokenEmbedding(config.patches_per_side**2, width, self.dtype, name="position_embedding")
        return patches.reshape(images, -1, width) + table(places)


class VisionLayer(nn.Module):
    """One pre-norm transformer layer over the patches of an image."""

    config: VisionConfig
    dtype: DType = jnp.float32
    backend: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:  # [N, L, C], [N, 1, 1, L]
        config, dtype = self.config, self.dtype
        h = LayerNorm(config.layer_norm_eps, dtype, name="layer_norm1")(x)
        x = x + VisionAttention(config, dtype, self.backend, name="self_attn")(h, mask)
        h = LayerNorm(config.layer_norm_eps, dtype, name="layer_norm2")(x)
        return x + VisionFeedForward(config.intermediate_size, config.hidden_act, dtype, name="mlp")(h)


class VisionAttention(nn.Module):
    """Multi-head self-attention, not causal."""

    config: VisionConfig
    dtype: DType = jnp.float32
    backend: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:  # [N, L, C]
        images, length, width = x.shape
        heads = self.config.num_attention_heads
        query, key, value = (
            Dense(width, dtype=self.dtype, name=name)(x).reshape(images, length, heads, width // heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y = attention(query, key, value, mask, self.backend)
        return Dense(width, dtype=self.dtype, name="out_proj")(y.reshape(x.shape))


class VisionFeedForward(nn.Module):
    """Two linear layers and the activation between them."""

    hidden: int
    act: str
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [N, L, C]
        h = Dense(self.hidden, dtype=self.dtype, name="fc1")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(activation(self.act)(h))


class VisionEncoder(nn.Module):
    """The stack of layers."""

    config: VisionConfig
    dtype: DType = jnp.float32
    backend: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:  # [N, L, C]
        for i in range(self.config.num_hidden_layers):
            x = VisionLayer(self.config, self.dtype, self.backend, name=f"layers.{i}")(x, mask)
        return x


class VisionModel(nn.Module):
    """Images to one vector a patch."""

    config: VisionConfig
    dtype: DType = jnp.float32
    backend: str = "xla"

    @nn.compact
    def __call__(self, pixels: jax.Array, patch_mask: jax.Array | None = None) -> jax.Array:
        """[N, H, W, 3], bool [N, h, w] or None -> [N, h * w, C]; patches that the mask leaves out are not seen."""
        mask = None if patch_mask is None else patch_mask.reshape(len(patch_mask), 1, 1, -1)
        x = VisionEmbeddings(self.config, self.dtype, name="embeddings")(pixels, patch_mask)
        x = VisionEncoder(self.config, self.dtype, self.backend, name="encoder")(x, mask)
        return LayerNorm(self.config.layer_norm_eps, self.dtype, name="post_layernorm")(x)


class PerceiverAttention(nn.Module):
    """Attention of the latents to the image and to themselves, without positions."""

    config: PerceiverConfig
    dtype: DType = jnp.float32
    backend: str = "xla"

    @nn.compact
    def __call__(self, latents: jax.Array, context: jax.Array, mask: jax.Array | None) -> jax.Array:
        config, size = self.config, self.config.resampler_head_dim

        def heads(name: str, x: jax.Array, count: int) -> jax.Array:
            y = Dense(count * size, use_bias=False, dtype=self.dtype, name=name)(x)
            return y.reshape(*x.shape[:2], count, size)

        both = jnp.concatenate([context, latents], axis=1)
        query = heads("q_proj", latents, config.resampler_n_heads)
        key = heads("k_proj", both, config.num_key_value_heads)
        value = heads("v_proj", both, config.num_key_value_heads)
        y = attention(query, key, value, mask, self.backend).reshape(*latents.shape[:2], -1)
        return Dense(config.hidden_size, use_bias=False, dtype=self.dtype, name="o_proj")(y)


class PerceiverLayer(nn.Module):
    """One layer of the resampler."""

    config: PerceiverConfig
    dtype: DType = jnp.float32
    backend: str = "xla"

    @nn.compact
    def __call__(self, latents: jax.Array, context: jax.Array, mask: jax.Array | None) -> jax.Array:
        config, dtype = self.config, self.dtype
        norms = {
            name: RMSNorm(config.rms_norm_eps, dtype, name=name)
            for name in ("input_latents_norm", "input_context_norm", "post_attention_layernorm")
        }
        attend = PerceiverAttention(config, dtype, self.backend, name="self_attn")
        x = latents + attend(norms["input_latents_norm"](latents), norms["input_context_norm"](context), mask)
        feed = GatedFeedForward(4 * config.hidden_size, config.hidden_size, config.hidden_act, dtype, name="mlp")
        return x + feed(norms["post_attention_layernorm"](x))


class PerceiverResampler(nn.Module):
    """Any number of patches to a fixed number of latents."""

    config: PerceiverConfig
    dtype: DType = jnp.float32
    backend: str = "xla"

    @nn.compact
    def __call__(self, context: jax.Array, patch_mask: jax.Array | None) -> jax.Array:
        """[N, L, C], bool [N, L] or None -> [N, resampler_n_latents, C]."""
        config = self.config
        shape = (config.resampler_n_latents, config.hidden_size)
        latents = self.param("latents", nn.initializers.ones, shape).astype(self.dtype)
        latents = jnp.broadcast_to(latents, (len(context), *shape))
        mask = None
        if patch_mask is not None:
            mask = jnp.concatenate([patch_mask, jnp.ones(latents.shape[:2], bool)], axis=1)[:, None, None, :]
        for i in range(config.resampler_depth):
            latents = PerceiverLayer(config, self.dtype, self.backend, name=f"layers.{i}")(latents, context, mask)
        return RMSNorm(config.rms_norm_eps, self.dtype, name="norm")(latents)


class Connector(nn.Module):
    """From the vision encoder's width to the text's, then to a fixed number of tokens."""

    config: Idefics2Config
    dtype: DType = jnp.float32
    backend: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, patch_mask: jax.Array | None) -> jax.Array:
        """[N, L, C_vision], bool [N, L] or None -> [N, resampler_n_latents, C_text]."""
        text = self.config.text
        project = GatedFeedForward(
            text.intermediate_size, text.hidden_size, text.hidden_act, self.dtype, name="modality_projection"
        )
        resample = PerceiverResampler(self.config.perceiver, self.dtype, self.backend, name="perceiver_resampler")
        return resample(project(x), patch_mask)
