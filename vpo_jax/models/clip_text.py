"""CLIP's text encoder (transformers `CLIPTextModel`) in Flax linen.

Only the last hidden state is computed. The end-of-text and padding ids, which transformers uses to find the
pooled output, change nothing in it: attention is causal and no padding is masked, as diffusers runs it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vpo_jax.models.attention import attention
from vpo_jax.models.config_fields import BOOKKEEPING, read_fields, require, require_int, require_positive
from vpo_jax.models.layers import Dense, LayerNorm, activation
from vpo_jax.runtime.types import DType

_ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh", "silu", "swish", "mish", "relu")

# Initialisation, dropout and the pooled output, which the last hidden state does not depend on.
_IGNORED = BOOKKEEPING | {"initializer_factor", "projection_dim"}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """The fields of text_encoder/config.json that the last hidden state depends on, with transformers' defaults."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    original: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "CLIPTextConfig":
        """The config from a parsed text_encoder/config.json.

        Raises:
            UserError: a field or value that this port does not honour, by name.
        """
        config = cls(**read_fields(cls, raw, "text_encoder", _IGNORED), original=dict(raw))
        _check(config)
        return config

    def to_dict(self) -> dict[str, Any]:
        """What goes back into text_encoder/config.json: the dict that was read, or one made from the fields."""
        if self.original:
            return dict(self.original)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "original"}
        return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **fields}


def _check(config: CLIPTextConfig) -> None:
    counts = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
    require_int("text_encoder", config, counts)
    require_int("text_encoder", config, ("num_hidden_layers",), minimum=0)
    divides = config.hidden_size % config.num_attention_heads == 0
    heads = f"{config.num_attention_heads} does not divide hidden_size {config.hidden_size}"
    require(divides, "text_encoder.num_attention_heads", heads)
    act = config.hidden_act
    require(act in _ACTIVATIONS, "text_encoder.hidden_act", f"{act!r} is not one of {', '.join(_ACTIVATIONS)}")
    require_positive("text_encoder", config, ("layer_norm_eps",))


class Embedding(nn.Module):
    """A table of vectors, looked up by row."""

    size: int
    features: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, indices: jax.Array) -> jax.Array:  # [...] -> [..., features]
        table = self.param("embedding", nn.initializers.normal(0.02), (self.size, self.features))
        return table.astype(self.dtype)[indices]


class Embeddings(nn.Module):
    """Token and position embeddings, added."""

    config: CLIPTextConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, input_ids: jax.Array) -> jax.Array:  # [B, L] -> [B, L, D]
        config, width = self.config, self.config.hidden_size
        tokens = Embedding(config.vocab_size, width, self.dtype, name="token_embedding")(input_ids)
        positions = jnp.arange(input_ids.shape[1])
        places = config.max_position_embeddings
        return tokens + Embedding(places, width, self.dtype, name="position_embedding")(positions)


class SelfAttention(nn.Module):
    """Causal multi-head self-attention."""

    config: CLIPTextConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, L, D]
        batch, length, width = x.shape
        heads = self.config.num_attention_heads
        query, key, value = (
            Dense(width, dtype=self.dtype, name=name)(x).reshape(batch, length, heads, width // heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]  # [1, 1, L, L]
        y = attention(query, key, value, mask=causal)
        return Dense(width, dtype=self.dtype, name="out_proj")(y.reshape(x.shape))


class FeedForward(nn.Module):
    """Two linear layers and the activation that the config names."""

    config: CLIPTextConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, L, D]
        h = Dense(self.config.intermediate_size, dtype=self.dtype, name="fc1")(x)
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(activation(self.config.hidden_act)(h))


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    config: CLIPTextConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, L, D]
        epsilon = self.config.layer_norm_eps
        h = LayerNorm(epsilon, dtype=self.dtype, name="layer_norm1")(x)
        x = x + SelfAttention(self.config, self.dtype, name="self_attn")(h)
        h = LayerNorm(epsilon, dtype=self.dtype, name="layer_norm2")(x)
        return x + FeedForward(self.config, self.dtype, name="mlp")(h)


class Encoder(nn.Module):
    """The stack of layers."""

    config: CLIPTextConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [B, L, D]
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, self.dtype, name=f"layers.{i}")(x)
        return x


class CLIPTextModel(nn.Module):
    """Token ids to the hidden states that condition the denoiser."""

    config: CLIPTextConfig
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, input_ids: jax.Array) -> jax.Array:
        """Last hidden state [B, L, D] after the final layer norm, of token ids [B, L].

        Raises:
            ValueError: more tokens than the model has positions for.
        """
        places = self.config.max_position_embeddings
        if input_ids.shape[1] > places:
            raise ValueError(f"input_ids: {input_ids.shape[1]} tokens, but the text encoder has {places} positions")
        x = Embeddings(self.config, self.dtype, name="embeddings")(input_ids)
        x = Encoder(self.config, self.dtype, name="encoder")(x)
        return LayerNorm(self.config.layer_norm_eps, dtype=self.dtype, name="final_layer_norm")(x)
