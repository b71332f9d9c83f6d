"""cuDNN's attention as shapes, so that a machine without cuDNN can trace and plan what a GPU will run."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive

# The names that jax gives its own primitives, which a machine with cuDNN traces.
FORWARD = "dot_product_attention_fwd_wrapper"
BACKWARD = "dot_product_attention_bwd_wrapper"

_described: ContextVar[bool] = ContextVar("described", default=False)


@contextlib.contextmanager
def as_shapes() -> Iterator[None]:
    """Within it attention by "cudnn" can be traced on any machine; what was traced without a GPU cannot run."""
    token = _described.set(True)
    try:
        yield
    finally:
        _described.reset(token)


def is_described() -> bool:
    """Whether `as_shapes` holds."""
    return _described.get()


def _like(*arrays: Any) -> list[ShapedArray]:
    return [ShapedArray(x.shape, x.dtype) for x in arrays]


def _forward_shapes(query: Any, key: Any, value: Any, bias: Any, *, is_training: bool) -> list[ShapedArray]:
    batch, queries, heads, _ = query.shape
    outputs = [ShapedArray((batch, queries, heads, value.shape[-1]), query.dtype)]
    return outputs + [ShapedArray((batch, heads, queries), jnp.dtype("float32"))] * is_training


_forward, _backward = Primitive(FORWARD), Primitive(BACKWARD)
_forward.multiple_results = _backward.multiple_results = True
_forward.def_abstract_eval(_forward_shapes)
_backward.def_abstract_eval(lambda query, key, value, bias, *_: _like(query, key, value, bias))


@jax.custom_vjp
def described_attention(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
    """The shapes of cuDNN's attention: its output, the sums of its softmax for the gradient, and the gradients.

    Args:
      query: [B, Q, H, D].
      key: [B, K, G, D].
      value: [B, K, G, D].
      bias: [1 or B, 1 or H, Q, K], or [0] for none, as jax passes it.

    Returns:
      As `query`.
    """
    y: jax.Array = _forward.bind(query, key, value, bias, is_training=False)[0]
    return y


def _vjp_forward(*inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    y, sums = _forward.bind(*inputs, is_training=True)
    return y, (*inputs, sums, y)


def _vjp_backward(saved: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(_backward.bind(*saved, gradient))


described_attention.defvjp(_vjp_forward, _vjp_backward)
