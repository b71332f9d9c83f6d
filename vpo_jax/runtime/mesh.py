"""Devices as a mesh of four axes, and sharding as data: an ordered list of (path pattern, spec)."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import path_of

AXES = ("data", "fsdp", "context", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))
VIDEO = PartitionSpec(("data", "fsdp"), "context")  # [B, F, ...]
ROWS = PartitionSpec(("data", "fsdp", "context"))  # [B, ...]; rows are independent: videos, frames or positions


class Trailing(NamedTuple):
    """A spec of a leaf's last two dimensions, whatever its rank; the dimensions before them are not sharded."""

    input: str | None
    output: str | None

    def spec(self, rank: int) -> PartitionSpec:
        """The spec of a leaf of this rank; a leaf with fewer dimensions has the last ones."""
        return PartitionSpec(*(None,) * (rank - 2), *self[max(0, 2 - rank) :])


Rules = Sequence[tuple[str, PartitionSpec | Trailing]]

# For models without rules of their own. Kernels are [..., in, out], whatever window stands in front; the
# input side is sharded over fsdp, so that a layer's weights are gathered once for its product. Adapters are small and
# replicated.
PARAMETER_RULES: Rules = (
    (r"lora_[AB]$", PartitionSpec()),
    (r"(kernel|embedding)$", Trailing("fsdp", "tensor")),
)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    context: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Mesh with the axes data, fsdp, context (frames) and tensor; at most one size may be -1 and takes the rest.

    A mesh smaller than the machine uses its first devices (one process only).
    Raises UserError when the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(len(devices), data, fsdp, context, tensor)
    fixed = int(np.prod(list(sizes.values())))
    blamed = max(sizes, key=lambda axis: sizes[axis])
    if fixed < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"mesh.{blamed}: the mesh {_spell(sizes)} uses {fixed} of {len(devices)} devices, and a run of several"
            f" processes has to use all; set mesh.data=-1"
        )
    # Auto axes: under make_mesh's default, Explicit, linen's logical constraints raise.
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:fixed])


def abstract_mesh(data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh of no devices."""
    return AbstractMesh((data, fsdp, context, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


class Meshes(NamedTuple):
    """What each part of a step is computed on; abstract meshes, where a job is planned.

    Attributes:
      update: all but the two below; the state lies on it.
      rollout: sampling; the devices of `update`, perhaps with other sizes of the axes.
      score: decoding for the scorers, and the scorers: the same devices, or others.
    """

    update: Any
    rollout: Any
    score: Any

    @classmethod
    def of(cls, mesh: Any) -> "Meshes":
        """One mesh for everything."""
        return cls(mesh, mesh, mesh)

    @property
    def apart(self) -> bool:
        """Whether the scorers have devices of their own."""
        return set(self.score.devices.flat) != set(self.update.devices.flat)


def make_meshes(axes: Mapping[str, Any], scoring: int = 0, devices: Sequence[jax.Device] | None = None) -> Meshes:
    """The meshes of a config's `mesh`: its axes, and its `rollout` and `score` as `parse_axes` reads them.

    The last `scoring` devices do nothing but score.
    Raises UserError when the sizes do not fit the devices.
    """
    rest, last = split_devices(scoring, devices)
    sizes, for_rollout, for_score = sizes_by_role(axes, len(rest), len(last))
    update = make_mesh(**sizes, devices=rest)
    own = list(update.devices.flat)
    return Meshes(
        update,
        update if for_rollout == sizes else _shaped_mesh(own, for_rollout),
        update if for_score == sizes and not last else _shaped_mesh(last or own, for_score),
    )


def _shaped_mesh(devices: Sequence[jax.Device], sizes: Mapping[str, int]) -> Mesh:
    # The order of devices stays: a program that moves arrays between a run's meshes is compiled for one order.
    shaped = np.array(devices, object).reshape(tuple(sizes.values()))
    return Mesh(shaped, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sizes_by_role(axes: Mapping[str, Any], count: int, scoring: int = 0) -> tuple[dict[str, int], ...]:
    """Sizes of the axes for (update, rollout, score) by a config's `mesh`, on `count` devices and `scoring` others.

    Raises UserError when they do not fit.
    """
    update = mesh_sizes(count, **{axis: axes[axis] for axis in AXES})
    own = int(np.prod(list(update.values())))
    rollout = _sizes_of_all(own, axes["rollout"], "mesh.rollout") if axes["rollout"] else update
    score = _sizes_of_all(scoring or own, axes["score"], "mesh.score") if axes["score"] or scoring else update
    return update, rollout, score


def _sizes_of_all(count: int, text: str, key: str) -> dict[str, int]:
    axes = parse_axes(text, key)
    fixed = int(np.prod([size for size in axes.values() if size != -1]))
    if count % fixed:
        raise UserError(f"{key}: {text!r} needs a multiple of {fixed} devices and has {count}; choose smaller sizes")
    sizes = mesh_sizes(count, **axes)
    if (used := int(np.prod(list(sizes.values())))) < count:
        raise UserError(f"{key}: {text!r} uses {used} of {count} devices; leave data out, and it takes the rest")
    return sizes


def parse_axes(text: str, key: str) -> dict[str, int]:
    """Sizes by axis of "fsdp=8,tensor=2"; an axis that is not named is 1, and data the rest if none has it.

    Raises UserError that names `key` for anything else.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in sizes or not re.fullmatch(r"-1|[1-9]\d{0,8}", size):
            raise UserError(
                f"{key}: {part!r} is not a size of an axis; give some of {', '.join(AXES)}, each once: fsdp=8,tensor=2"
            )
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"{key}: {text!r} gives the rest to several axes; only one may be -1")
    return {"data": 1 if -1 in sizes.values() else -1} | sizes


def split_devices(count: int, devices: Sequence[jax.Device] | None = None) -> tuple[list[jax.Device], list[jax.Device]]:
    """All devices but the last `count`, and those.

    Raises UserError where none would be left, or where the run has several processes.
    """
    devices = list(jax.devices() if devices is None else devices)
    if count and jax.process_count() > 1:
        raise UserError(
            "reward.devices: a run of several processes scores on all of its devices; set reward.devices=0, and shard a"
            " large scorer with mesh.score (docs/scorers.md)"
        )
    if count >= len(devices):
        raise UserError(
            f"reward.devices: {count} of {len(devices)} devices leave none to train on; give at most {len(devices) - 1}"
        )
    return devices[: len(devices) - count], devices[len(devices) - count :]


def mesh_sizes(count: int, data: int = -1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> dict[str, int]:
    """Sizes of the four axes on `count` devices; at most one may be -1 and takes the rest.

    Raises UserError when they do not fit.
    """
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise UserError(f"mesh.{axis}: {size} is not a size; give a number from 1 up, or -1 for the rest")
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise UserError(f"mesh.{open_axes[1]}: only one axis may be -1, and mesh.{open_axes[0]} is; give a number")
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    blamed = open_axes[0] if open_axes else max(sizes, key=lambda axis: sizes[axis])
    if fixed > count:
        raise UserError(
            f"mesh.{blamed}: the mesh {_spell(sizes)} needs {fixed} devices and there are {count};"
            f" make the sizes smaller, or set mesh.data=-1 to take what is there"
        )
    if open_axes:
        if count % fixed:
            raise UserError(
                f"mesh.{blamed}: {count} devices are not a multiple of {fixed} ({_spell(sizes)});"
                f" choose sizes whose product divides {count}"
            )
        sizes[blamed] = count // fixed
    return sizes


def _spell(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items())


def infer_shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """The tree's shardings by the first rule whose pattern is found in a leaf's path "a/b/c", else replicated.

    A dimension that its axes do not divide, or that the leaf lacks, is replicated.
    Leaves need only a `shape`: arrays or `jax.ShapeDtypeStruct`.
    """
    compiled = [(re.compile(pattern), spec) for pattern, spec in rules]

    def sharding(keypath: tuple[Any, ...], leaf: Any) -> NamedSharding:
        path = path_of(keypath)
        spec = next((spec for pattern, spec in compiled if pattern.search(path)), PartitionSpec())
        spec = spec.spec(len(leaf.shape)) if isinstance(spec, Trailing) else spec
        return NamedSharding(mesh, fit(spec, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def fit(spec: PartitionSpec, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """`spec` for an array of this shape: a dimension that its axes do not divide, or that it lacks, is replicated."""
    fitted = []
    for size, axes in zip(shape, spec, strict=False):
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        parts = int(np.prod([mesh.shape[name] for name in names]))
        fitted.append(axes if size % parts == 0 else None)
    return PartitionSpec(*fitted)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: its first dimension over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def batch_size(mesh: Mesh) -> int:
    """Number of shards of a batch on the mesh."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`x` with its sharding pinned to `spec` inside a jit under `jax.set_mesh`; `x` itself outside a mesh.

    A dimension that its axes do not divide is replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, fit(spec, x.shape, mesh))


def frames_are_sharded() -> bool:
    """Whether the mesh of `jax.set_mesh` shards videos along their frames.

    [B, F] then must not become one axis [B * F]: XLA would gather all frames on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape["context"] > 1
