"""Arrays that stay on disk: each is read when it is used, in the dtype and with the slices that are wanted there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vpo_jax.runtime.types import DType, Tree


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """A leaf of a parameter tree that takes no memory: every use reads it anew, one layer after the other.

    It has what code asks of an array without numbers (`shape`, `dtype`, `nbytes`, `astype`), and `numpy.asarray`
    reads it. JAX does not take it: see `put`.

    Attributes:
      shape: of the array.
      dtype: of what is read.
      layer: (number, index) -> these slices of one layer, in any dtype; perhaps a view of a mapped file.
      stacked: whether the first axis counts layers; else the array is one layer, whose number is 0.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    layer: Callable[[int, Any], np.ndarray]
    stacked: bool = False

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of what is read."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self, index: Any = ...) -> np.ndarray:
        """These slices (a slice for each axis, or `...`) in memory of their own; infinite where the dtype is small."""
        with np.errstate(over="ignore"):
            return self._read_layers(index) if self.stacked else np.array(self.layer(0, index), self.dtype, order="C")

    def _read_layers(self, index: Any) -> np.ndarray:
        layers, *rest = (slice(None), ...) if index is ... else index
        numbers = range(self.shape[0])[layers]
        parts = (self.layer(number, tuple(rest)) for number in numbers)
        first = next(parts)
        whole = np.empty((len(numbers), *first.shape), self.dtype)
        whole[0] = first
        for place, part in enumerate(parts, start=1):
            whole[place] = part
        return whole

    def part(self, number: int, index: Any = ...) -> np.ndarray:
        """Slices of one layer in the array's dtype, infinite where that is too small; perhaps a view."""
        with np.errstate(over="ignore"):
            return np.asarray(self.layer(number, index)).astype(self.dtype, copy=False)

    def astype(self, dtype: DType) -> Stored:
        """The array in another dtype, rounded to its own before; nothing is read."""
        return dataclasses.replace(self, dtype=np.dtype(dtype), layer=self.part)

    def map(self, function: Callable[[int, np.ndarray], np.ndarray]) -> Stored:
        """The array of `function(number, layer)`, which keeps shape and dtype, of each layer; nothing is read."""
        return dataclasses.replace(self, layer=lambda number, index: function(number, self.part(number))[index])

    def placed(self, sharding: jax.sharding.Sharding) -> jax.Array:
        """The array on its devices; a process reads only the slices that its own devices hold, each once."""
        return place_slices(self.shape, sharding, self.read)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array on disk cannot be seen without a copy")
        return self.read() if dtype is None else self.read().astype(dtype, copy=False)


def place_slices(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, read: Callable[[Any], np.ndarray]
) -> jax.Array:
    """An array from `read(index)`, once it is on its devices: many at a time would lie in host memory together."""
    found: dict[str, np.ndarray] = {}

    def once(index: Any) -> np.ndarray:
        key = str(index)
        if key not in found:
            found[key] = read(index)
        return found[key]

    return jax.make_array_from_callback(shape, sharding, once).block_until_ready()


def put(tree: Tree, shardings: Tree) -> Tree:
    """`jax.device_put` for trees of arrays that may be on disk, which go one by one."""
    if not any(isinstance(leaf, Stored) for leaf in jax.tree.leaves(tree)):
        return jax.device_put(tree, shardings)

    def one(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        return x.placed(sharding) if isinstance(x, Stored) else jax.device_put(x, sharding)

    return jax.tree.map(one, tree, shardings)
