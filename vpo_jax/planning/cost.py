"""The cost of a function, from its jaxpr: nothing is compiled or run, and shapes may be of any size."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Cost(NamedTuple):
    """Of one call.

    Attributes:
      flops: of matrix products and convolutions, 2 a multiply-add; other operations do not count.
      traffic: bytes that those read and write: a lower bound, unless a kernel keeps intermediate values on the chip.
      temporaries: estimated peak of bytes beside the arguments, results included. Values that are computed element by
        element are taken to be fused into what reads them, unless a product reads them.
    """

    flops: float
    traffic: float
    temporaries: float


def measure(function: Callable[..., Any], *args: Any) -> Cost:
    """Cost of `function(*args)`; the arguments may be `jax.ShapeDtypeStruct`s."""
    return _measure(jax.make_jaxpr(function)(*args).jaxpr)


class Value:
    """An intermediate value: its bytes, and the values in memory that it is computed from when it is asked for."""

    def __init__(self, size: float, roots: "frozenset[Value] | None" = None) -> None:
        self.size = size
        self.roots = frozenset((self,)) if roots is None else roots


class Step(NamedTuple):
    """One primitive of the flat program."""

    primitive: str
    params: dict[str, Any]
    inputs: list[Any]  # (aval, name of the value or None for a literal)
    outputs: list[Any]


_INLINED = {"pjit", "jit", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "remat", "remat2",
            "checkpoint", "closed_call", "core_call"}  # fmt: skip
_HEAVY = {"dot_general", "conv_general_dilated", "scan", "while", "cond", "sort", "gather", "scatter", "scatter-add",
          "custom_call", "shard_map", "reduce_window", "cumsum", "argmax", "argmin", "top_k"}  # fmt: skip
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"}


def _flatten(jaxpr: Any, names: dict[Any, int], fresh: Iterator[int], steps: list[Step]) -> None:
    """Appends the primitives of `jaxpr`, calls replaced by what they call; `names` maps its variables to values."""

    def read(atom: Any) -> tuple[Any, int | None]:
        return atom.aval, (None if hasattr(atom, "val") else names[atom])

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        inner = _called(eqn) if eqn.primitive.name in _INLINED else None
        if inner is None:
            for var in eqn.outvars:
                names[var] = next(fresh)
            outputs = [(var.aval, names[var]) for var in eqn.outvars]
            steps.append(Step(eqn.primitive.name, eqn.params, inputs, outputs))
            continue
        inside = {var: _constant(var.aval, fresh, steps) for var in inner.constvars}
        for var, (aval, name) in zip(inner.invars, inputs, strict=True):
            inside[var] = _constant(aval, fresh, steps) if name is None else name
        _flatten(inner, inside, fresh, steps)
        for var, atom in zip(eqn.outvars, inner.outvars, strict=True):
            names[var] = _constant(var.aval, fresh, steps) if hasattr(atom, "val") else inside[atom]


def _constant(aval: Any, fresh: Iterator[int], steps: list[Step]) -> int:
    steps.append(Step("constant", {}, [], [(aval, next(fresh))]))
    return steps[-1].outputs[0][1]


def _called(eqn: Any) -> Any:
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            inner = eqn.params[key]
            return getattr(inner, "jaxpr", inner)
    return None


def _measure(jaxpr: Any) -> Cost:
    fresh = itertools.count()
    names = {var: next(fresh) for var in (*jaxpr.invars, *jaxpr.constvars)}
    arguments = frozenset(names.values())
    steps: list[Step] = []
    _flatten(jaxpr, names, fresh, steps)
    results = [names[atom] for atom in jaxpr.outvars if not hasattr(atom, "val")]

    # Which values have to lie in memory: what heavy primitives make or read, and the results.
    kept = set(results)
    for step in steps:
        if step.primitive in _HEAVY:
            kept.update(name for _, name in (*step.inputs, *step.outputs))
        elif step.primitive in _REDUCTIONS:
            kept.update(name for _, name in step.outputs)

    values: dict[int | None, Value] = {name: Value(0.0) for name in arguments}
    last: dict[Value, int] = {}
    flops = traffic = 0.0
    inside: list[float] = []
    made: list[list[Value]] = []
    for place, step in enumerate(steps):
        roots = frozenset().union(*(values[name].roots for _, name in step.inputs if name is not None))
        for root in roots:
            last[root] = place
        new = []
        for aval, name in step.outputs:
            value = Value(_bytes(aval)) if name in kept else Value(0.0, roots)
            values[name] = value
            if name in kept:
                new.append(value)
                last[value] = place
        made.append(new)
        cost = _of_step(step)
        flops, traffic = flops + cost.flops, traffic + cost.traffic
        inside.append(cost.temporaries)
    for name in results:
        for root in values[name].roots:
            last[root] = len(steps)

    live = peak = 0.0
    dying: dict[int, list[Value]] = {}
    for value, place in last.items():
        dying.setdefault(place, []).append(value)
    for place, new in enumerate(made):
        live += sum(value.size for value in new)
        peak = max(peak, live + inside[place])
        live -= sum(value.size for value in dying.get(place, ()))
    return Cost(flops, traffic, peak)


def _of_step(step: Step) -> Cost:
    """Flops and traffic of a primitive, and what it needs inside."""
    name, params = step.primitive, step.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = step.inputs[0][0].shape
        flops = 2.0 * _size(step.outputs[0][0].shape) * _size([left[axis] for axis in contracted])
    elif name == "conv_general_dilated":
        numbers, kernel = params["dimension_numbers"], step.inputs[1][0].shape
        flops = 2.0 * _size(step.outputs[0][0].shape) * _size(kernel) / kernel[numbers.rhs_spec[0]]
        # Zeros of a dilated input are not multiplied.
        flops /= math.prod(params["lhs_dilation"] or (1,))
    elif name == "scan":
        body = _measure(params["jaxpr"].jaxpr)
        return Cost(body.flops * params["length"], body.traffic * params["length"], body.temporaries)
    elif name == "while":  # the number of rounds is not known: one
        return _measure(params["body_jaxpr"].jaxpr)
    elif name == "cond":
        branches = [_measure(branch.jaxpr) for branch in params["branches"]]
        return Cost(*(max(values) for values in zip(*branches, strict=True)))
    else:
        return Cost(0.0, 0.0, 0.0)
    return Cost(flops, sum(_bytes(aval) for aval, _ in (*step.inputs, *step.outputs)), 0.0)


def _size(shape: Sequence[int]) -> float:
    return float(math.prod(shape))


def _bytes(aval: Any) -> float:
    if not hasattr(aval, "shape"):
        return 0.0
    try:
        return _size(aval.shape) * np.dtype(aval.dtype).itemsize
    except TypeError:  # a random key
        return _size(aval.shape) * 8.0
