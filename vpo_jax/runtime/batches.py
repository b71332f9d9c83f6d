"""Batches in microbatches: how a batch is split, computed part by part and joined again."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vpo_jax.runtime.types import Tree


def split_batch(tree: Tree, microbatch: int) -> Tree:
    """[B, ...] as [M, microbatch, ...]; microbatch j holds every M-th row, so that each device keeps its own rows.

    A `microbatch` of 0, or one that is not smaller than the batch, is the whole batch: M = 1.
    """

    def split(x: jax.Array) -> jax.Array:
        size = min(microbatch or x.shape[0], x.shape[0])
        return jnp.swapaxes(x.reshape(size, x.shape[0] // size, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, tree)


def join_batch(tree: Tree) -> Tree:
    """The inverse of `split_batch`."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def in_microbatches(function: Callable[[Tree], Tree], batch: Tree, microbatch: int) -> Tree:
    """`function` of a tree of [B, ...], `microbatch` rows at a time, as `split_batch` reads the number."""
    chunks = split_batch(batch, microbatch)
    if jax.tree.leaves(chunks)[0].shape[0] == 1:
        return function(batch)
    return join_batch(jax.lax.map(function, chunks))


def fit_microbatch(microbatch: int, batch: int) -> int:
    """Rows at a time of a batch that may be smaller than the one the microbatch was chosen for, or no multiple of it.

    It is a multiple of whatever divides both, as the number of devices does. 0 = all.
    """
    return batch if batch <= microbatch else math.gcd(microbatch, batch)
