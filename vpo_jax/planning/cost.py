"""The cost of a function, from its jaxpr: nothing is compiled or run, and shapes may be of any size."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vpo_jax.models.fused_attention import BACKWARD, FORWARD, as_shapes
from vpo_jax.planning.flops import flops_of
from vpo_jax.planning.layout import (
    ONE_DEVICE,
    ROWS,
    WHOLE,
    Axes,
    Layout,
    Sizes,
    axes_of,
    contracted,
    follow,
    join,
    reshaped,
    whole,
    without,
)
from vpo_jax.runtime.mesh import abstract_mesh


class Cost(NamedTuple):
    """Of one call, on one device.

    Attributes:
      flops: of matrix products and convolutions, 2 a multiply-add, and of attention in one kernel; other operations do
        not count.
      traffic: bytes that those read and write: a lower bound, unless a kernel keeps intermediate values on the chip.
      temporaries: estimated peak of bytes beside the arguments, results included. Values that are computed element by
        element are taken to be fused into what reads them, unless a product reads them.
      sent: bytes that it exchanges with the devices that share its rows, over context and tensor.
    """

    flops: float
    traffic: float
    temporaries: float
    sent: float = 0.0


def measure(function: Callable[..., Any], *args: Any) -> Cost:
    """Cost of `function(*args)` on one device; the arguments may be `jax.ShapeDtypeStruct`s."""
    return trace(function, args).on(ONE_DEVICE)


class Size(NamedTuple):
    """Bytes of a value, and what divides them."""

    bytes: float
    axes: Axes = WHOLE

    def on(self, sizes: Sizes) -> float:
        """Bytes of one device."""
        return self.bytes / sizes.parts(self.axes) if self.axes else self.bytes


class Value:
    """An intermediate value: its bytes, and the values in memory that it is computed from when it is asked for."""

    def __init__(self, size: Size, roots: "frozenset[Value] | None" = None) -> None:
        self.size = size
        self.roots = frozenset((self,)) if roots is None else roots


class Step(NamedTuple):
    """One primitive of the flat program."""

    primitive: str
    params: dict[str, Any]
    inputs: list[Any]  # (aval, name of the value or None for a literal)
    outputs: list[Any]


class Work(NamedTuple):
    """What a step costs on any mesh.

    Attributes:
      flops, by: of all devices that share the rows, and the axes that divide them.
      moved: what it reads and writes.
      needed: what it holds beside its inputs and outputs, as a kernel's workspace.
      gathered: weights that it reads whole where fsdp divides them.
      sent: (bytes, axis over whose devices, how often each byte travels).
      inner: of a loop or of branches: `times` bodies, or the dearest of them.
      times: see `inner`.
      made, freed: what takes and leaves memory.
    """

    flops: float
    by: Axes
    moved: list[Size]
    needed: list[Size]
    gathered: list[Size]
    sent: list[tuple[Size, str, int]]
    inner: "list[Profile]"
    times: float
    made: list[Size]
    freed: list[Size]

    def on(self, sizes: Sizes) -> Cost:
        """Cost of a call, whose temporaries are what it needs inside."""
        count = lambda values: sum(value.on(sizes) for value in values)  # noqa: E731
        inside = count(self.needed) + (count(self.gathered) if sizes["fsdp"] > 1 else 0.0)
        sent = sum(often * size.on(sizes) * (sizes[axis] - 1) / sizes[axis] for size, axis, often in self.sent)
        cost = Cost(self.flops / sizes.parts(self.by), count(self.moved), inside, sent)
        if not self.inner:
            return cost
        flops, traffic, temporaries, more = (
            max(values) for values in zip(*(body.on(sizes) for body in self.inner), strict=True)
        )
        times = self.times
        return Cost(flops * times, traffic * times, temporaries + inside, more * times + sent)


class Profile(NamedTuple):
    """A program's steps, from which its cost on any mesh follows."""

    work: list[Work]
    results: list[Layout]

    @property
    def axes(self) -> set[str]:
        """The mesh axes whose sizes change its cost."""
        found: set[str] = set()
        for work in self.work:
            values = (*work.moved, *work.needed, *work.gathered, *work.made)
            found |= {axis for axes in (work.by, *(size.axes for size in values)) for axis, n in axes if n > 1}
            found |= {"fsdp"} if work.gathered else set()
            found |= set().union(*(body.axes for body in work.inner))
        return found

    def on(self, sizes: Sizes) -> Cost:
        """Cost of a call on one device of a mesh with these sizes; its rows are those of the device."""
        flops = traffic = sent = live = peak = 0.0
        for work in self.work:
            cost = work.on(sizes)
            flops, traffic, sent = flops + cost.flops, traffic + cost.traffic, sent + cost.sent
            live += sum(size.on(sizes) for size in work.made)
            peak = max(peak, live + cost.temporaries)
            live -= sum(size.on(sizes) for size in work.freed)
        return Cost(flops, traffic, peak, sent)


def trace(function: Callable[..., Any], args: Sequence[Any], layouts: Sequence[Layout] = (), rows: int = 1) -> Profile:
    """The profile of `function(*args)`.

    Args:
      function: may name mesh axes in its sharding constraints.
      args: may be `jax.ShapeDtypeStruct`s.
      layouts: of the flat arguments; none: every device holds them.
      rows: of the batch, as they lie in the arguments' dimensions that `layouts` says to hold rows.
    """
    # On a mesh of one device the constraints stand in the program with all their axes.
    with as_shapes(), jax.sharding.use_abstract_mesh(abstract_mesh()):
        jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    given = list(layouts) or [whole(var.aval) for var in jaxpr.invars]
    return _Reader(rows).read(jaxpr, given)


_INLINED = {"pjit", "jit", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "remat", "remat2",
            "checkpoint", "closed_call", "core_call"}  # fmt: skip
_HEAVY = {"dot_general", "conv_general_dilated", "scan", "while", "cond", "sort", "gather", "scatter", "scatter-add",
          "custom_call", "shard_map", "reduce_window", "cumsum", "argmax", "argmin", "top_k", FORWARD,
          BACKWARD}  # fmt: skip
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


class _Reader:
    """Reads jaxprs of one program; the shapes of weights that fsdp divides tell their gradients."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.weights: dict[tuple[int, ...], Layout] = {}

    def read(self, jaxpr: Any, given: Sequence[Layout], wanted: Sequence[Layout] = ()) -> Profile:
        """The profile of a jaxpr with the layouts of its arguments, and with those that its results are asked for."""
        fresh = itertools.count()
        names = {var: next(fresh) for var in (*jaxpr.invars, *jaxpr.constvars)}
        steps: list[Step] = []
        _flatten(jaxpr, names, fresh, steps)
        results = [names[atom] for atom in jaxpr.outvars if not hasattr(atom, "val")]
        layouts: dict[int | None, Layout] = {names[var]: whole(var.aval) for var in jaxpr.constvars}
        for var, layout in zip(jaxpr.invars, given, strict=True):
            layouts[names[var]] = layout
            self._note(var.aval, layout)
        inner = [self._follow(step, layouts) for step in steps]
        for atom, layout in zip(jaxpr.outvars, wanted, strict=False):
            if not hasattr(atom, "val"):
                shape = atom.aval.shape
                layouts[names[atom]] = join(shape, [(shape, layouts[names[atom]]), (shape, layout)])
        _widen(steps, layouts)
        work = [self._work(step, layouts, bodies) for step, bodies in zip(steps, inner, strict=True)]
        _live(steps, work, layouts, _arguments(jaxpr, names), results)
        final = [whole(atom.aval) if hasattr(atom, "val") else layouts[names[atom]] for atom in jaxpr.outvars]
        return Profile([one for one in work if one.flops or one.inner or one.made or one.freed or one.sent], final)

    def _note(self, aval: Any, layout: Layout) -> None:
        if any(axis == "fsdp" for axis, _ in axes_of(layout)):
            self.weights[tuple(sorted(aval.shape))] = layout

    def _follow(self, step: Step, layouts: dict[int | None, Layout]) -> list[Profile]:
        """Sets the layouts of a step's outputs; the profiles of what it calls."""
        name, params = step.primitive, step.params
        inputs = [(aval, whole(aval) if key is None else layouts[key]) for aval, key in step.inputs]
        given = [layout for _, layout in inputs]
        bodies: list[Profile] = []
        outputs = None
        if name == "scan":
            constants, carried = params["num_consts"], params["num_carry"]
            fixed, each = given[:constants], [layout[1:] for layout in given[constants + carried :]]
            carry = given[constants : constants + carried]
            body = self.read(params["jaxpr"].jaxpr, [*fixed, *carry, *each])
            shapes = [aval.shape for aval, _ in inputs[constants : constants + carried]]
            joined = [
                join(shape, [(shape, a), (shape, b)]) for shape, a, b in zip(shapes, carry, body.results, strict=False)
            ]
            if joined != list(carry):
                body = self.read(params["jaxpr"].jaxpr, [*fixed, *joined, *each])
            bodies = [body]
            outputs = [*body.results[:carried], *((WHOLE, *layout) for layout in body.results[carried:])]
        elif name == "while":
            skipped = params["cond_nconsts"]
            bodies = [self.read(params["body_jaxpr"].jaxpr, given[skipped:])]
            outputs = bodies[0].results
        elif name == "cond":
            bodies = [self.read(branch.jaxpr, given[1:]) for branch in params["branches"]]
            outputs = [
                join(aval.shape, [(aval.shape, body.results[i]) for body in bodies])
                for i, (aval, _) in enumerate(step.outputs)
            ]
            # A branch that has no value for a result gives zeros, divided as the others' values are.
            bodies = [self.read(branch.jaxpr, given[1:], outputs) for branch in params["branches"]]
        elif name == FORWARD:
            batch, positions, heads, _ = given[0]
            outputs = [given[0], (batch, heads, positions)]
        elif name == BACKWARD:
            outputs = given[:4]
        for place, (aval, key) in enumerate(step.outputs):
            layout = follow(name, params, inputs, aval, self.rows) if outputs is None else outputs[place]
            if name == "dot_general" and ROWS in dict(contracted(name, params, inputs)):
                layout = self._of_gradient(aval, layout)
            layouts[key] = layout
        return bodies

    def _of_gradient(self, aval: Any, layout: Layout) -> Layout:
        """A sum over the rows of all devices, shaped as a weight, is its gradient, and lies as the weight does."""
        found = self.weights.get(tuple(sorted(aval.shape)), ())
        divided = {positions for axis, positions in axes_of(found) if axis == "fsdp"}
        for place, size in enumerate(aval.shape):
            if size in divided and not layout[place]:
                return (*layout[:place], frozenset({("fsdp", size)}), *layout[place + 1 :])
        return layout

    def _work(self, step: Step, layouts: Mapping[int | None, Layout], bodies: list[Profile]) -> Work:
        name, params = step.primitive, step.params
        inputs = [(aval, whole(aval) if key is None else layouts[key]) for aval, key in step.inputs]
        outputs = [(aval, layouts[key]) for aval, key in step.outputs]
        shapes = [[getattr(aval, "shape", ()) for aval, _ in values] for values in (step.inputs, step.outputs)]
        flops = flops_of(step.primitive, step.params, *shapes)
        moved: list[Size] = []
        needed: list[Size] = []
        gathered: list[Size] = []
        if flops:
            moved = [_size_of(aval, layout, "fsdp") for aval, layout in (*inputs, *outputs)]
            gathered = [size for size, (_, layout) in zip(moved, inputs, strict=False)
                        if any(axis == "fsdp" for axis, _ in axes_of(layout))]  # fmt: skip
        if name == BACKWARD:  # the queries' gradient is summed in float32
            query, layout = inputs[0]
            needed = [Size(4.0 * _size(query.shape), axes_of(layout))]
        sent: list[tuple[Size, str, int]] = []
        here = {axis for axis, _ in axes_of(outputs[0][1])} if outputs else set()
        for axis in ("context", "tensor"):
            if axis in dict(contracted(name, params, inputs)):
                sent += [(_size_of(aval, layout), axis, 2) for aval, layout in outputs]
            if name == "sharding_constraint" and axis in dict(axes_of(inputs[0][1])) and axis not in here:
                sent.append((_size_of(*outputs[0]), axis, 1))
        if name == BACKWARD and "context" in dict(axes_of(inputs[0][1])):
            sent += [(_size_of(aval, layout), "context", 2) for aval, layout in outputs[1:3]]
        by = WHOLE.union(*(axes_of(layout) for _, layout in (*inputs, *outputs))) if flops else WHOLE
        times = float(params["length"]) if name == "scan" else 1.0
        return Work(flops, without(by, "fsdp"), moved, needed, gathered, sent, bodies, times, [], [])


def _arguments(jaxpr: Any, names: Mapping[Any, int]) -> list[int]:
    return [names[var] for var in (*jaxpr.invars, *jaxpr.constvars)]


def _widen(steps: Sequence[Step], layouts: dict[int | None, Layout]) -> None:
    """A product that is added to divided values is divided alike: the partitioner follows programs backwards too."""
    pinned = {key for step in steps if step.primitive == "sharding_constraint" for _, key in step.outputs}
    free = {key for step in steps for _, key in step.outputs} - pinned
    for step in reversed(steps):
        if len(step.outputs) != 1 or step.primitive in _HEAVY:
            continue
        aval, key = step.outputs[0]
        for other, source in step.inputs:
            if source not in free:
                continue
            if step.primitive == "reshape":
                asked = reshaped(aval.shape, layouts[key], other.shape)
            elif other.shape == aval.shape and step.primitive not in ("sharding_constraint", "transpose", "rev"):
                asked = layouts[key]
            else:
                continue
            layouts[source] = join(other.shape, [(other.shape, layouts[source]), (other.shape, asked)])


def _live(
    steps: Sequence[Step],
    work: Sequence[Work],
    layouts: Mapping[int | None, Layout],
    arguments: Sequence[int],
    results: Sequence[int],
) -> None:
    """Enters into the work what each step makes and frees."""
    # Which values have to lie in memory: what heavy primitives make or read, and the results.
    kept = set(results)
    for step in steps:
        if step.primitive in _HEAVY:
            kept.update(name for _, name in (*step.inputs, *step.outputs))
        elif step.primitive in _REDUCTIONS:
            kept.update(name for _, name in step.outputs)
    values: dict[int | None, Value] = {name: Value(Size(0.0)) for name in arguments}
    last: dict[Value, int] = {}
    for place, step in enumerate(steps):
        roots = frozenset().union(*(values[name].roots for _, name in step.inputs if name is not None))
        for root in roots:
            last[root] = place
        for aval, name in step.outputs:
            values[name] = Value(_size_of(aval, layouts[name])) if name in kept else Value(Size(0.0), roots)
            if name in kept:
                work[place].made.append(values[name].size)
                last[values[name]] = place
    held = {root for name in results for root in values[name].roots}
    for value, place in last.items():
        if value not in held and value.size.bytes:
            work[place].freed.append(value.size)


def _size(shape: Sequence[int]) -> float:
    return float(math.prod(shape))


def _size_of(aval: Any, layout: Layout, *but: str) -> Size:
    return Size(_bytes(aval), without(axes_of(layout), *but))


def _bytes(aval: Any) -> float:
    if not hasattr(aval, "shape"):
        return 0.0
    try:
        return _size(aval.shape) * np.dtype(aval.dtype).itemsize
    except TypeError:  # a random key
        return _size(aval.shape) * 8.0
