"""Scaled dot-product attention: one function, several backends."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vpo_jax.runtime.mesh import frames_are_sharded

Backend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def _xla(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    scale = query.shape[-1] ** -0.5
    if query.shape[-2] != key.shape[-2]:
        return _grouped(query * scale, key, value, mask)
    scores = jnp.einsum("...qhd,...khd->...hqk", query * scale, key, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


def _grouped(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    batch, length, heads, size = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, length, groups, heads // groups, size)  # no copy of a key is made for its queries
    scores = jnp.einsum("bqgrd,bkgd->bgrqk", query, key, preferred_element_type=jnp.float32)
    if mask is not None:
        mask = mask[:, :, None] if mask.shape[1] == 1 else mask.reshape(*scores.shape[:3], *mask.shape[2:])
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bgrqk,bkgd->bqgrd", weights, value).reshape(batch, length, heads, size)


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
      query: [B, Q, H, D]; or [B, N, Q, H, D] with keys and values alike, each of N attending by itself.
      key: [B, K, G, D]; G divides H, and query heads h * H/G to (h + 1) * H/G - 1 share head h of the keys.
      value: [B, K, G, D].
      mask: bool, broadcastable to [B, H, Q, K]; True where a query may look at a key.
      backend: a name in `BACKENDS`. "cudnn" wants half precision on an NVIDIA GPU and D a multiple of 8, at
        most 128; a TPU kernel finds its place in the same table.

    Returns:
      As `query`, in the dtype of `value`.
    """
    if query.ndim == 4:
        return BACKENDS[backend](query, key, value, mask)
    assert mask is None
    if frames_are_sharded():  # the two axes cannot become one; see there
        return _xla(query, key, value, None)
    one = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    return BACKENDS[backend](one(query), one(key), one(value), None).reshape(query.shape)
