"""Mistral's decoder (transformers `MistralModel`) in Flax linen: grouped-query attention, rotary positions.

Qwen2's is the same one with biases on queries, keys and values, and windows in some layers only.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpo_jax.models import idefics2_config, qwen2_vl_config
from vpo_jax.models.attention import attention
from vpo_jax.models.layers import Dense, GatedFeedForward, RMSNorm
from vpo_jax.runtime.types import DType

DecoderConfig = idefics2_config.TextConfig | qwen2_vl_config.TextConfig


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


class Prefix(NamedTuple):
    """What a decoder has read so far: several continuations of one beginning need it only once.

    Attributes:
        mask: bool [B, K], the real tokens.
        keys, values: [B, K, G, D] of each layer, keys rotated already.
    """

    mask: jax.Array
    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


def fill_in(embeddings: jax.Array, places: jax.Array, features: jax.Array) -> jax.Array:
    """Embeddings [B, L, C] with the rows of features [B, n, C] at places (bool [B, L], n of them a row), in order."""
    which = jnp.clip(jnp.cumsum(places, axis=1) - 1, 0, features.shape[1] - 1)
    return jnp.where(places[..., None], jnp.take_along_axis(features, which[..., None], axis=1), embeddings)


def causal_mask(token_mask: jax.Array, queries: int, window: int | None) -> jax.Array:
    """Which key each of the last `queries` tokens may look at: bool [B, K] (True = real) -> [B, 1, queries, K].

    A key is real, not after its query and, with a window, fewer than `window` places before it.
    """
    places = jnp.arange(token_mask.shape[1])
    distance = places[-queries:, None] - places[None, :]
    near = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return near[None, None] & token_mask[:, None, None, :]


class SelfAttention(nn.Module):
    """Causal attention in which several query heads share a key and value head."""

    config: DecoderConfig
    dtype: DType = jnp.float32
    backend: str = "xla"

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, angles: jax.Array, before: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """[B, L, C] -> the same, and all keys and values: those of `before`, then those of x."""
        config, size = self.config, self.config.head_size

        def heads(name: str, count: int) -> jax.Array:
            y = Dense(count * size, use_bias=config.qkv_bias, dtype=self.dtype, name=name)(x)
            return y.reshape(*x.shape[:2], count, size)

        query = rotate(heads("q_proj", config.num_attention_heads), angles)
        key = rotate(heads("k_proj", config.num_key_value_heads), angles)
        value = heads("v_proj", config.num_key_value_heads)
        if before is not None:
            key, value = (jnp.concatenate(pair, axis=1) for pair in zip(before, (key, value), strict=True))
        y = attention(query, key, value, mask, self.backend).reshape(*x.shape[:2], -1)
        return Dense(config.hidden_size, use_bias=False, dtype=self.dtype, name="o_proj")(y), (key, value)


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    config: DecoderConfig
    dtype: DType = jnp.float32
    backend: str = "xla"

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array, angles: jax.Array, before: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """As `SelfAttention`."""
        config = self.config
        h = RMSNorm(config.rms_norm_eps, self.dtype, name="input_layernorm")(x)
        y, both = SelfAttention(config, self.dtype, self.backend, name="self_attn")(h, mask, angles, before)
        x = x + y
        h = RMSNorm(config.rms_norm_eps, self.dtype, name="post_attention_layernorm")(x)
        feed = GatedFeedForward(config.intermediate_size, config.hidden_size, config.hidden_act, self.dtype, name="mlp")
        return x + feed(h), both


class TokenEmbedding(nn.Module):
    """A table of vectors, looked up by row before anything is cast: the table is large, the rows are few."""

    size: int
    features: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, indices: jax.Array) -> jax.Array:  # [...] -> [..., features]
        table = self.param("embedding", nn.initializers.normal(0.02), (self.size, self.features))
        return jnp.asarray(table)[indices].astype(self.dtype)


class MistralModel(nn.Module):
    """A decoder over embeddings, so that images can take the place of tokens."""

    config: DecoderConfig
    dtype: DType = jnp.float32
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

    def __call__(
        self,
        embeddings: jax.Array,
        token_mask: jax.Array,
        before: Prefix | None = None,
        angles: jax.Array | None = None,
    ) -> tuple[jax.Array, Prefix]:
        """Last hidden state [B, L, C] after the final norm, and all that was read.

        Positions count real tokens only, so that padding on either side changes nothing.

        Args:
            embeddings: [B, L, C].
            token_mask: bool [B, L]; False is padding, and what comes out there means nothing. The real tokens of
                a row lie side by side, those of `before` included.
            before: the beginning that these tokens continue.
            angles: [B, L, D / 2] of the tokens' rotation, where positions do more than count.
        """
        length = embeddings.shape[1]
        whole = token_mask if before is None else jnp.concatenate([before.mask, token_mask], axis=1)
        if angles is None:
            positions = jnp.maximum(jnp.cumsum(whole, axis=1) - 1, 0)[:, -length:]
            angles = rotary_angles(positions, self.config.head_size, self.config.rope_theta)
        masks = {window: causal_mask(whole, length, window) for window in set(self.config.windows)}
        x = embeddings.astype(self.dtype)
        read = []
        for i, (layer, window) in enumerate(zip(self.layers, self.config.windows, strict=True)):
            x, both = layer(x, masks[window], angles, None if before is None else (before.keys[i], before.values[i]))
            read.append(both)
        return self.norm(x), Prefix(whole, tuple(key for key, _ in read), tuple(value for _, value in read))
