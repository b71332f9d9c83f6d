"""umT5's encoder (transformers `UMT5EncoderModel`) in Flax linen: relative positions, pre-norm, gated feed-forward.

It differs from T5's in its table of relative positions, of which every layer has its own. Layers are stacked under
"block.*" and run by one scan, so that the 24 of umT5-xxl compile as one.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.models.config_fields import BOOKKEEPING, read_fields, require, require_int, require_positive
from vpo_jax.models.layers import Dense, RMSNorm, activation
from vpo_jax.models.mistral import TokenEmbedding
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.types import DType

# transformers' name -> that of `activation`
_ACTIVATIONS = {
    "gelu_new": "gelu_pytorch_tanh", "gelu_pytorch_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "relu": "relu",
    "silu": "silu", "swish": "silu", "mish": "mish", "quick_gelu": "quick_gelu",
}  # fmt: skip

# Dropout, initialisation, the decoder and heads, which the encoder does not depend on. transformers does not read
# scalable_attention and output_past, which the original checkpoints carry.
_IGNORED = BOOKKEEPING | {
    "classifier_dropout", "dropout_rate", "initializer_factor", "n_positions", "num_decoder_layers", "output_past",
    "scalable_attention", "scale_decoder_outputs",
}  # fmt: skip

_SHARED, _TIED = "shared.weight", "encoder.embed_tokens.weight"

# Mesh TensorFlow's, from which T5's come: no scale by 1 / sqrt(d_kv) in attention, so the queries' is smaller by it.
_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """The fields of text_encoder/config.json that the encoder depends on, with transformers' defaults.

    `dense_act_fn` and `is_gated_act` are read where they are there and else follow from `feed_forward_proj`, as in
    transformers.
    """

    vocab_size: int = 250112
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"
    dense_act_fn: str | None = None
    is_gated_act: bool | None = None
    original: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "UMT5Config":
        """The config from a parsed text_encoder/config.json.

        Raises:
            UserError: a field or value that this port does not honour, by name.
        """
        config = cls(**read_fields(cls, raw, "text_encoder", _IGNORED), original=dict(raw))
        require(not raw.get("is_decoder"), "text_encoder.is_decoder", "only the encoder is supported; use false")
        _check(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """What goes back into text_encoder/config.json: the dict that was read, or one made from the fields."""
        if self.original:
            return dict(self.original)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "original"}
        given = {name: value for name, value in fields.items() if value is not None}
        return {"architectures": ["UMT5EncoderModel"], "model_type": "umt5", **given}

    @property
    def act_fn(self) -> str:
        """The activation by transformers' name; "gated-gelu" means the tanh approximation there."""
        if self.dense_act_fn is not None:
            return self.dense_act_fn
        return "gelu_new" if self.feed_forward_proj == "gated-gelu" else self.feed_forward_proj.split("-")[-1]

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layers have a gate."""
        return self.feed_forward_proj.startswith("gated-") if self.is_gated_act is None else self.is_gated_act


def _check(config: UMT5Config) -> None:
    require_int("text_encoder", config, ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"))
    # Both directions have a bucket for each short distance and one at least for the longer ones.
    require_int("text_encoder", config, ("relative_attention_num_buckets",), minimum=4)
    exact = config.relative_attention_num_buckets // 4
    require_int("text_encoder", config, ("relative_attention_max_distance",), minimum=exact + 1)
    require_positive("text_encoder", config, ("layer_norm_epsilon",))
    proj = config.feed_forward_proj
    form = f"{proj!r} must be an activation or gated-ACTIVATION, as gated-gelu"
    require(proj.removeprefix("gated-").count("-") == 0, "text_encoder.feed_forward_proj", form)
    field = "feed_forward_proj" if config.dense_act_fn is None else "dense_act_fn"
    known = f"{config.act_fn!r} is not one of {', '.join(_ACTIVATIONS)}"
    require(config.act_fn in _ACTIVATIONS, f"text_encoder.{field}", known)


def one_embedding(state: Mapping[str, np.ndarray], where: str = "state dict") -> dict[str, np.ndarray]:
    """A state dict with the table of embeddings as `shared.weight` alone, whichever of its two names it has on disk.

    Raises:
        UserError: both names are there with different values.
    """
    found = dict(state)
    tied = found.pop(_TIED, None)
    if tied is None:
        return found
    if not np.array_equal(found.setdefault(_SHARED, tied), tied):
        raise UserError(f"{where}: {_SHARED} and {_TIED} differ, but umT5 has one table; remove the wrong one")
    return found


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Row of the table for each query and key: int32 [L, L] (T5, arXiv 1910.10683).

    Half of the buckets are for keys after the query. Of each half, the first half holds one distance each; the rest
    grows by a constant factor up to `max_distance`, and the last one holds all that is farther.
    """
    positions = np.arange(length)
    offset = positions[None, :] - positions[:, None]
    half, distance = buckets // 2, np.abs(offset)
    exact = half // 2
    # In float32 as transformers, since distances that are a power of the factor lie on the border of two buckets.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return ((offset > 0) * half + np.where(distance < exact, distance, far)).astype(np.int32)


class PositionBias(nn.Module):
    """What is added to the scores of attention: a number for each head and distance."""

    buckets: int
    heads: int

    @nn.compact
    def __call__(self, rows: jax.Array) -> jax.Array:  # [L, L] -> float32 [H, L, L]
        table = self.param("embedding", nn.initializers.normal(0.02), (self.buckets, self.heads))
        return jnp.asarray(table).T.astype(jnp.float32)[:, rows]


class SelfAttention(nn.Module):
    """Attention in both directions with a bias by distance, and without the scale 1 / sqrt(d_kv)."""

    config: UMT5Config
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, rows: jax.Array, mask: jax.Array) -> jax.Array:  # [B, L, D], [L, L], [B, L]
        config, heads, size = self.config, self.config.num_heads, self.config.d_kv

        def projected(name: str, scale: float = 1.0) -> jax.Array:
            init = nn.initializers.variance_scaling(scale, "fan_in", "normal")
            y = Dense(heads * size, use_bias=False, dtype=self.dtype, kernel_init=init, name=name)(x)
            return y.reshape(*x.shape[:2], heads, size)

        query, key, value = projected("q", 1 / size), projected("k"), projected("v")
        bias = PositionBias(config.relative_attention_num_buckets, heads, name="relative_attention_bias")(rows)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) + bias
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(*x.shape[:2], heads * size)
        return Dense(config.d_model, use_bias=False, dtype=self.dtype, kernel_init=_init, name="o")(y)


class FeedForward(nn.Module):
    """wo(act(wi_0(x)) * wi_1(x)), or wo(act(wi(x))) without a gate.

    In bfloat16 `wo` is bfloat16 too: transformers keeps it in float32 under float16 alone.
    """

    config: UMT5Config
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, L, D]
        config = self.config

        def dense(features: int, name: str) -> Dense:
            return Dense(features, use_bias=False, dtype=self.dtype, kernel_init=_init, name=name)

        act = activation(_ACTIVATIONS[config.act_fn])
        if config.gated:
            h = act(dense(config.d_ff, "wi_0")(x)) * dense(config.d_ff, "wi_1")(x)
        else:
            h = act(dense(config.d_ff, "wi")(x))
        return dense(config.d_model, "wo")(h)


class AttentionLayer(nn.Module):
    """x + attention(norm(x))."""

    config: UMT5Config
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, rows: jax.Array, mask: jax.Array) -> jax.Array:
        h = RMSNorm(self.config.layer_norm_epsilon, self.dtype, name="layer_norm")(x)
        return x + SelfAttention(self.config, self.dtype, name="SelfAttention")(h, rows, mask)


class FeedForwardLayer(nn.Module):
    """x + feed_forward(norm(x))."""

    config: UMT5Config
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = RMSNorm(self.config.layer_norm_epsilon, self.dtype, name="layer_norm")(x)
        return x + FeedForward(self.config, self.dtype, name="DenseReluDense")(h)


class Block(nn.Module):
    """Attention and feed-forward, as the body of a scan."""

    config: UMT5Config
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, rows: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        x = AttentionLayer(self.config, self.dtype, name="layer.0")(x, rows, mask)
        return FeedForwardLayer(self.config, self.dtype, name="layer.1")(x), None


class Encoder(nn.Module):
    """The stack of layers and the final norm."""

    config: UMT5Config
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:  # [B, L, D], [B, L]
        config = self.config
        buckets, farthest = config.relative_attention_num_buckets, config.relative_attention_max_distance
        rows = jnp.asarray(relative_buckets(x.shape[1], buckets, farthest))
        layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=config.num_layers,
        )
        x, _ = layers(config, self.dtype, name="block.*")(x, rows, mask)
        return RMSNorm(config.layer_norm_epsilon, self.dtype, name="final_layer_norm")(x)


class UMT5EncoderModel(nn.Module):
    """Token ids to the hidden states that condition the denoiser.

    Parameters of the layers are stacked: "encoder/block.*/layer.0/..." is [layers, ...]. float16 overflows.
    """

    config: UMT5Config
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Last hidden state [B, L, d_model] after the final norm.

        Rows of real tokens do not depend on L: a prompt that is padded on the right has those of the prompt alone.

        Args:
            ids: int32 [B, L].
            mask: bool [B, L]; False is padding, and what comes out there means nothing.
        """
        config = self.config
        x = TokenEmbedding(config.vocab_size, config.d_model, self.dtype, name="shared")(ids)
        return Encoder(config, self.dtype, name="encoder")(x, mask)
