"""The blocks that WanTransformer3DModel is a stack of, and their rotary positions."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from vpo_jax.models.attention import KEYS, QUERIES, attention
from vpo_jax.models.layers import Dense, LayerNorm, RMSNorm, standardise
from vpo_jax.models.wan_transformer_config import WanTransformerConfig
from vpo_jax.runtime.mesh import VIDEO, constrain
from vpo_jax.runtime.types import DType, FloatTable

TOKENS = VIDEO  # [B, T, D]: what shards a video along its frames shards its tokens
_HIDDEN = PartitionSpec(("data", "fsdp"), "context", "tensor")  # [B, T, ffn_dim]
_ROPE_BASE = 10000.0

# (cos, sin), each [T, head_dim / 2]
Rotation = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Compute:
    """How to compute, as opposed to what: nothing here changes a parameter."""

    dtype: DType = jnp.float32
    attention_backend: str = "xla"
    lora_scale: float = 1.0

    def dense(self, features: int, name: str, dtype: DType | None = None) -> Dense:
        return Dense(features, dtype=dtype or self.dtype, lora_scale=self.lora_scale, name=name)


def rotary_tables(sizes: tuple[int, int, int], head_dim: int) -> tuple[tuple[FloatTable, FloatTable], ...]:
    """Per axis (frames, rows, columns) the cosines and sines of its positions, float32 [size, its channels / 2].

    Rows and columns have 2 * (head_dim // 6) of a head's channels each, frames the rest. Angles are made in float64:
    at position 1023 those of float32 are wrong by 7e-5.
    """
    side = 2 * (head_dim // 6)
    tables = []
    for size, channels in zip(sizes, (head_dim - 2 * side, side, side), strict=True):
        frequencies = _ROPE_BASE ** -(np.arange(0, channels, 2, dtype=np.float64) / max(channels, 1))
        angles = np.outer(np.arange(size), frequencies)
        tables.append((np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)))
    return tuple(tables)


def rotation(sizes: tuple[int, int, int], head_dim: int) -> Rotation:
    """The cosines and sines of tokens in the order frames, rows, columns; in the program only the small tables are."""

    def spread(which: int) -> jax.Array:
        parts = []
        for axis, table in enumerate(tables):
            shape = [1, 1, 1, table[which].shape[1]]
            shape[axis] = sizes[axis]
            parts.append(jnp.broadcast_to(table[which].reshape(shape), (*sizes, shape[-1])))
        return jnp.concatenate(parts, -1).reshape(-1, head_dim // 2)

    tables = rotary_tables(sizes, head_dim)
    return spread(0), spread(1)


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """[B, T, H, D] with each pair of neighbouring channels turned by its token's angle, in float32, then as it was."""
    cos, sin = (table[:, None] for table in by)  # [T, 1, D / 2]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], -1)
    return turned.reshape(x.shape).astype(x.dtype)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Tokens [B, T, D] standardised, then scaled by 1 + scale [B, 1, D] and shifted, in float32, then as they were."""
    return (standardise(x, epsilon) * (1 + scale) + shift).astype(x.dtype)


def gated_sum(x: jax.Array, y: jax.Array, gate: jax.Array) -> jax.Array:
    """x + y gate in float32, then as x was; gate is [B, 1, D]."""
    return (x.astype(jnp.float32) + y.astype(jnp.float32) * gate).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention whose queries and keys are normalised over all heads together, before these are split."""

    config: WanTransformerConfig
    compute: Compute

    def setup(self) -> None:
        width, compute = self.config.width, self.compute
        self.to_q, self.to_k, self.to_v = (compute.dense(width, name) for name in ("to_q", "to_k", "to_v"))
        self.norm_q, self.norm_k = (RMSNorm(self.config.eps, compute.dtype, name=name) for name in ("norm_q", "norm_k"))
        self.to_out = compute.dense(width, "to_out.0")

    def keys_and_values(self, source: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, K, D] -> keys and values [B, K, H, D / H]."""
        return self._heads(self.norm_k(self.to_k(source))), self._heads(self.to_v(source))

    def __call__(
        self,
        x: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        name: str,
        positions: Rotation | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """[B, T, D] attending to keys [B, K, H, D / H]; `name` is what a rematerialisation policy calls the result."""
        queries = self._heads(self.norm_q(self.to_q(x)))
        if positions is not None:
            queries, keys = rotate(queries, positions), rotate(keys, positions)
        queries, keys, values = constrain(queries, QUERIES), constrain(keys, KEYS), constrain(values, KEYS)
        y = attention(queries, keys, values, backend=self.compute.attention_backend, bias=bias)
        # Before the projection, whose gradient needs it.
        y = checkpoint_name(constrain(y, QUERIES), name)
        return constrain(self.to_out(y.reshape(x.shape)), TOKENS)

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.config.num_attention_heads, -1)


class FeedForward(nn.Module):
    """Two linear layers with a GELU, by its tanh approximation, between them."""

    config: WanTransformerConfig
    compute: Compute

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, D]
        h = constrain(self.compute.dense(self.config.ffn_dim, "net.0.proj")(x), _HIDDEN)
        h = checkpoint_name(h, "ffn_activation")  # before the GELU, whose gradient needs it and which is cheap
        return constrain(self.compute.dense(x.shape[-1], "net.2")(nn.gelu(h, approximate=True)), TOKENS)


class Block(nn.Module):
    """Self-attention, attention to the text, feed-forward; the first and the last modulated by the timestep.

    Norms, modulation and the sums of self-attention and feed-forward are in float32, the sum of cross-attention in
    the computation's dtype, as in diffusers.
    """

    config: WanTransformerConfig
    compute: Compute

    def setup(self) -> None:
        width, eps = self.config.width, self.config.eps
        self.scale_shift_table = self.param("scale_shift_table", nn.initializers.normal(width**-0.5), (1, 6, width))
        self.attn1 = Attention(self.config, self.compute)
        self.attn2 = Attention(self.config, self.compute)
        if self.config.cross_attn_norm:
            self.norm2 = LayerNorm(eps, self.compute.dtype)
        self.ffn = FeedForward(self.config, self.compute)

    def encode_text(self, carry: tuple[()], text: jax.Array) -> tuple[tuple[()], tuple[jax.Array, jax.Array]]:
        """The keys and values that this block's tokens attend to; the carry is what `nn.scan` asks for."""
        return carry, self.attn2.keys_and_values(text)

    def __call__(
        self,
        x: jax.Array,
        text: tuple[jax.Array, jax.Array],
        modulation: jax.Array,
        positions: Rotation,
        bias: jax.Array | None,
    ) -> tuple[jax.Array, None]:
        """One block on tokens [B, T, D].

        Args:
          x: the tokens.
          text: keys and values of the text, each [B, L, H, D / H].
          modulation: of the timestep, [B, 6, D].
          positions: of the tokens.
          bias: added to the scores of the text's rows, [1, 1, 1, L].

        Returns:
          The tokens, and None: `nn.scan` asks for a pair.
        """
        x = checkpoint_name(constrain(x, TOKENS), "hidden_states")
        table = self.scale_shift_table.astype(jnp.float32) + modulation.astype(jnp.float32)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = jnp.split(table, 6, axis=1)  # [B, 1, D]

        h = modulate(x, shift, scale, self.config.eps)
        h = self.attn1(h, *self.attn1.keys_and_values(h), "self_attn", positions)
        x = gated_sum(x, h, gate)

        h = self.norm2(x) if self.config.cross_attn_norm else x
        x = x + self.attn2(h, *text, "cross_attn", bias=bias)

        h = modulate(x, ffn_shift, ffn_scale, self.config.eps)
        return gated_sum(x, self.ffn(h), ffn_gate), None
