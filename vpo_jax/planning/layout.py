"""How values of a program lie on a mesh: read from its sharding constraints, followed through its primitives.

A mesh's sizes play no part: a layout says which axes divide a value wherever these divide its dimensions. It is a
likely reading of what XLA's partitioner does, not its result; the compiler's numbers stand in docs/plans.md.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

# Mesh axes that divide one dimension, each with the positions that it must divide. "rows" stands for data and fsdp
# where they divide a batch: its rows are counted by device already.
Axes = frozenset[tuple[str, int]]
Layout = tuple[Axes, ...]
WHOLE: Axes = frozenset()
ROWS = "rows"

_MOVES = {"gather", "scatter", "scatter-add", "reduce_window", "select_and_scatter_add"}
_REDUCTIONS = ("reduce_", "argm")


def axes_of(layout: Layout) -> Axes:
    """All axes that divide a value."""
    return WHOLE.union(*layout)


class Sizes:
    """Sizes of a mesh's axes, and into how many parts these divide values; an axis that is not named has one device."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = {axis: sizes.get(axis, 1) for axis in ("fsdp", "context", "tensor")}
        self._known: dict[Axes, int] = {}

    def __getitem__(self, axis: str) -> int:
        return self._sizes[axis]

    def parts(self, axes: Axes) -> int:
        """Of a value; an axis that does not divide its positions leaves it whole."""
        if axes not in self._known:
            sizes = {axis: self._sizes.get(axis, 1) for axis, _ in axes}
            self._known[axes] = math.prod({a: sizes[a] for a, positions in axes if positions % sizes[a] == 0}.values())
        return self._known[axes]


ONE_DEVICE = Sizes({})


def of_spec(spec: PartitionSpec, shape: Sequence[int], rows: int) -> Layout:
    """The layout that a spec asks for; of a dimension that holds a batch's rows, what is left of it by row counts."""
    layout = []
    for size, entry in zip(shape, (*spec, *(None,) * len(shape)), strict=False):
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        if "data" in names:
            left = size // rows if size % rows == 0 else size
            layout.append(frozenset({(ROWS, 0)} | {(name, left) for name in names if name not in ("data", "fsdp")}))
        else:
            layout.append(frozenset((name, size) for name in names))
    return tuple(layout)


def whole(aval: Any) -> Layout:
    """The layout of what every device holds."""
    return (WHOLE,) * len(getattr(aval, "shape", ()))


def join(shape: Sequence[int], layouts: Sequence[tuple[Sequence[int], Layout]]) -> Layout:
    """The layout of a value that is computed position by position from others of its rank; an axis is taken once."""
    joined: list[Axes] = []
    taken: set[str] = set()
    for place, size in enumerate(shape):
        found = WHOLE
        for other, layout in layouts:
            if len(other) == len(shape) and (other[place] == size or min(other[place], size) > 1):
                found |= layout[place]
        once = {axis: positions for axis, positions in sorted(found) if axis not in taken}
        taken |= set(once)
        joined.append(frozenset(once.items()))
    return tuple(joined)


def follow(name: str, params: Mapping[str, Any], inputs: Sequence[tuple[Any, Layout]], out: Any, rows: int) -> Layout:
    """The layout of a primitive's output, by its parameters and its inputs (aval, layout)."""
    shape = tuple(getattr(out, "shape", ()))
    if not shape or not inputs:
        return whole(out)
    first, layout = inputs[0]
    if name == "sharding_constraint":
        kept = [axes & {(ROWS, 0)} for axes in layout]
        asked = of_spec(params["sharding"].spec, shape, rows)
        return tuple(a | b for a, b in zip(kept, asked, strict=True))
    if name == "dot_general":
        return _of_product(params, inputs, shape)
    if name == "conv_general_dilated":
        return _of_convolution(params, inputs, shape)
    if name == "reshape":
        return reshaped(first.shape, layout, shape)
    if name == "transpose":
        return tuple(layout[axis] for axis in params["permutation"])
    if name == "broadcast_in_dim":
        placed = dict(zip(params["broadcast_dimensions"], range(len(layout)), strict=True))
        return tuple(
            layout[placed[i]] if i in placed and first.shape[placed[i]] == size else WHOLE
            for i, size in enumerate(shape)
        )
    if name == "squeeze":
        return tuple(axes for i, axes in enumerate(layout) if i not in params["dimensions"])
    if name == "unstack":
        return tuple(axes for i, axes in enumerate(layout) if i != params["axis"])
    if name == "stack":
        joined = join(first.shape, [(aval.shape, axes) for aval, axes in inputs])
        return (*joined[: params["axis"]], WHOLE, *joined[params["axis"] :])
    if name.startswith(_REDUCTIONS) and "axes" in params:
        return tuple(axes for i, axes in enumerate(layout) if i not in params["axes"])
    if name in _MOVES:
        return whole(out)
    return join(shape, [(aval.shape, axes) for aval, axes in inputs if hasattr(aval, "shape")])


def contracted(name: str, params: Mapping[str, Any], inputs: Sequence[tuple[Any, Layout]]) -> Axes:
    """Axes over whose parts a primitive sums, so that devices have to add what they computed."""
    if name == "dot_general":
        dims, _ = params["dimension_numbers"]
        return WHOLE.union(*(layout[i] for (_, layout), own in zip(inputs, dims, strict=True) for i in own))
    if name == "reduce_sum":
        return WHOLE.union(*(inputs[0][1][i] for i in params["axes"]))
    return WHOLE


def without(axes: Axes, *names: str) -> Axes:
    """The axes but these."""
    return frozenset(pair for pair in axes if pair[0] not in names)


def _gathered(layout: Layout) -> Layout:
    # A product reads its weights whole: fsdp divides the rows.
    return tuple(without(axes, "fsdp") for axes in layout)


def _once(layout: Sequence[Axes]) -> Layout:
    taken: set[str] = set()
    result = []
    for axes in layout:
        result.append(without(axes, *taken))
        taken |= {axis for axis, _ in axes}
    return tuple(result)


def _of_product(params: Mapping[str, Any], inputs: Sequence[tuple[Any, Layout]], shape: Sequence[int]) -> Layout:
    (summed, batch) = params["dimension_numbers"]
    left, right = (_gathered(layout) for _, layout in inputs)
    shared = [left[i] | right[j] for i, j in zip(*batch, strict=True)]
    free = [
        axes
        for layout, own, together in ((left, summed[0], batch[0]), (right, summed[1], batch[1]))
        for i, axes in enumerate(layout)
        if i not in own and i not in together
    ]
    assert len(shared) + len(free) == len(shape)
    return _once([*shared, *free])


def _of_convolution(params: Mapping[str, Any], inputs: Sequence[tuple[Any, Layout]], shape: Sequence[int]) -> Layout:
    numbers = params["dimension_numbers"]
    (_, left), (_, right) = ((aval, _gathered(layout)) for aval, layout in inputs)
    result = [WHOLE] * len(shape)
    for source, target in zip(numbers.lhs_spec, numbers.out_spec, strict=True):
        result[target] = left[source]
    result[numbers.out_spec[1]] = right[numbers.rhs_spec[0]]
    return _once(result)


def reshaped(before: Sequence[int], layout: Layout, after: Sequence[int]) -> Layout:
    """Axes of dimensions that become one stay on it; of one that is split they go to the first part, rows before."""
    result = [WHOLE] * len(after)
    if 0 in after:
        return tuple(result)
    i = j = 0
    while i < len(before) and j < len(after):
        start, target, left, right = i, j, before[i], after[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        axes = WHOLE.union(*layout[start:i])
        places = [place for place in range(target, j) if after[place] > 1] or [target]
        rows, rest = axes & {(ROWS, 0)}, without(axes, ROWS)
        if rows:
            result[target] |= rows
            if rest:
                places = [place for place in places if place != target] or [target]
        result[places[0]] |= rest
    return tuple(result)
