"""Scaled dot-product attention: one function, several backends."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Backend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def _xla(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * scale, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def _cudnn(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="cudnn")


BACKENDS: dict[str, Backend] = {"xla": _xla, "cudnn": _cudnn}


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    backend: str = "xla",
) -> jax.Array:
    """Softmax(query key^T / sqrt(D)) value, with scores and softmax in float32.

    Args:
      query: [B, Q, H, D].
      key: [B, K, H, D].
      value: [B, K, H, D].
      mask: bool, broadcastable to [B, H, Q, K]; True where a query may look at a key.
      backend: a name in `BACKENDS`. "cudnn" wants half precision on an NVIDIA GPU and D a multiple of 8, at
        most 128; a TPU kernel finds its place in the same table.

    Returns:
      [B, Q, H, D] in the dtype of `value`.
    """
    return BACKENDS[backend](query, key, value, mask)
