"""Mistral's decoder (transformers `MistralModel`) in Flax linen: grouped-query attention, rotary positions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpo_jax.models.attention import attention
from vpo_jax.models.idefics2_config import TextConfig
from vpo_jax.models.layers import Dense, GatedFeedForward, RMSNorm


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """Angle of each pair of channels at each position: int32 [B, L] -> float32 [B, L, head_dim / 2]."""
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    return positions.astype(jnp.float32)[..., None] * frequencies


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864): channel i turns with channel i + D / 2.

    x [B, L, H, D], angles [B, L, D / 2]; computed in float32, returned in x's dtype.
    """
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def causal_mask(token_mask: jax.Array, window: int | None) -> jax.Array:
    """Which key a query may look at: bool [B, L] (True = a real token) -> [B, 1, L, L].

    A key is real, not after its query and, with a window, fewer than `window` places before it.
    """
    places = jnp.arange(token_mask.shape[1])
    distance = places[:, None] - places[None, :]
    near = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return near[None, None] & token_mask[:, None, None, :]


class SelfAttention(nn.Module):
    """Causal attention in which several query heads share a key and value head."""

    config: TextConfig
    dtype: Any = jnp.float32
    backend: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, angles: jax.Array) -> jax.Array:  # [B, L, C]
        config, size = self.config, self.config.head_size

        def heads(name: str, count: int) -> jax.Array:
            y = Dense(count * size, use_bias=False, dtype=self.dtype, name=name)(x)
            return y.reshape(*x.shape[:2], count, size)

        query = rotate(heads("q_proj", config.num_attention_heads), angles)
        key = rotate(heads("k_proj", config.num_key_value_heads), angles)
        value = heads("v_proj", config.num_key_value_heads)
        y = attention(query, key, value, mask, self.backend).reshape(*x.shape[:2], -1)
        return Dense(config.hidden_size, use_bias=False, dtype=self.dtype, name="o_proj")(y)


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    config: TextConfig
    dtype: Any = jnp.float32
    backend: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, angles: jax.Array) -> jax.Array:  # [B, L, C]
        config = self.config
        h = RMSNorm(config.rms_norm_eps, self.dtype, name="input_layernorm")(x)
        x = x + SelfAttention(config, self.dtype, self.backend, name="self_attn")(h, mask, angles)
        h = RMSNorm(config.rms_norm_eps, self.dtype, name="post_attention_layernorm")(x)
        feed = GatedFeedForward(config.intermediate_size, config.hidden_size, config.hidden_act, self.dtype, name="mlp")
        return x + feed(h)


class TokenEmbedding(nn.Module):
    """A table of vectors, looked up by row before anything is cast: the table is large, the rows are few."""

    size: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, indices: jax.Array) -> jax.Array:  # [...] -> [..., features]
        table = self.param("embedding", nn.initializers.normal(0.02), (self.size, self.features))
        return jnp.asarray(table)[indices].astype(self.dtype)


class MistralModel(nn.Module):
    """A decoder over embeddings, so that images can take the place of tokens."""

    config: TextConfig
    dtype: Any = jnp.float32
    backend: str = "xla"

    def setup(self) -> None:
        """Submodules, named as in the checkpoint."""
        config = self.config
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size, self.dtype)
        self.layers = [
            Layer(config, self.dtype, self.backend, name=f"layers.{i}") for i in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(config.rms_norm_eps, self.dtype)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Embeddings of token ids, int32 [B, L] -> [B, L, C]."""
        return self.embed_tokens(ids)

    def __call__(self, embeddings: jax.Array, token_mask: jax.Array) -> jax.Array:
        """Last hidden state [B, L, C] after the final norm.

        Positions count real tokens only, so that padding on either side changes nothing.

        Args:
            embeddings: [B, L, C].
            token_mask: bool [B, L]; False is padding, and what comes out there means nothing. The real tokens of
                a row lie side by side.
        """
        positions = jnp.maximum(jnp.cumsum(token_mask, axis=1) - 1, 0)
        angles = rotary_angles(positions, self.config.head_size, self.config.rope_theta)
        mask = causal_mask(token_mask, self.config.sliding_window)
        x = embeddings.astype(self.dtype)
        for layer in self.layers:
            x = layer(x, mask, angles)
        return self.norm(x)
