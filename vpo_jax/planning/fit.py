"""A job on a mesh of chips: bytes, and the floor of a step's time."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec

from vpo_jax.algorithms.state import TrainState, infer_state_shardings
from vpo_jax.planning.chips import USABLE, Topology
from vpo_jax.planning.cost import Cost, Profile, trace
from vpo_jax.planning.job import Job
from vpo_jax.planning.layout import Sizes, of_spec
from vpo_jax.runtime.batches import fit_microbatch
from vpo_jax.runtime.mesh import AXES, BATCH, Meshes, abstract_mesh, infer_shardings, sizes_by_role
from vpo_jax.runtime.programs import Program
from vpo_jax.runtime.trees import bytes_of

Tree = Any


@dataclasses.dataclass(frozen=True)
class Linear:
    """Cost of a program as a straight line: once a call, and for each row of the batch.

    Attributes:
      once, each: of a batch in which rows that share work lie together.
      shared: how many rows share work; a batch that is no multiple of it costs `alone` a row.
      alone: of one row by itself.
    """

    once: Cost
    each: Cost
    shared: int
    alone: Cost

    def at(self, batch: float) -> Cost:
        """Cost of a call with this batch."""
        if batch % self.shared:
            return Cost(*(cost * batch for cost in self.alone))
        return Cost(*(a + b * batch for a, b in zip(self.once, self.each, strict=True)))


class Lines:
    """Costs of a job's programs on any mesh, from the real functions at one and two units of rows."""

    def __init__(self, job: Job) -> None:
        self._programs = {program.name: program for program in job.programs}
        self._profiles = {program.name: _profiles(program, job) for program in job.programs}
        self._axes = {name: set().union(*(p.axes for p in three)) for name, three in self._profiles.items()}
        self._known: dict[Any, Linear] = {}

    def on(self, name: str, sizes: Mapping[str, int]) -> Linear:
        """Of a program on one device of a mesh with these sizes of fsdp, context and tensor."""
        key = name, *(sizes.get(axis, 1) if axis in self._axes[name] else 1 for axis in AXES[1:])
        if key not in self._known:
            self._known[key] = self._line(name, Sizes(sizes))
        return self._known[key]

    def _line(self, name: str, sizes: Sizes) -> Linear:
        program, profiles = self._programs[name], self._profiles[name]
        one, two, alone = (profile.on(sizes) for profile in profiles)
        unit = program.unit * program.shared
        each = Cost(*(max(0.0, b - a) / unit for a, b in zip(one, two, strict=True)))
        once = Cost(*(max(0.0, a - unit * e) for a, e in zip(one, each, strict=True)))
        return Linear(once, each, program.shared, alone)


def measure_programs(job: Job) -> Lines:
    """Traces a job's programs; their costs on any mesh follow at once."""
    return Lines(job)


def _profiles(program: Program, job: Job) -> tuple[Profile, Profile, Profile]:
    """Of one and of two units of rows that share work, and of one unit by itself."""
    rules = job.pipeline.family.sharding_rules
    one_device: Any = abstract_mesh()

    def traced(rows: int) -> Profile:
        arguments = program.arguments(rows)
        layouts: list[Any] = []
        for tree, role in zip(arguments, program.roles, strict=True):
            if role == "parameters":  # on a mesh of one device every rule holds
                specs = [sharding.spec for sharding in jax.tree.leaves(infer_shardings(tree, one_device, rules))]
            else:
                specs = [BATCH if role == "batch" else PartitionSpec()] * len(jax.tree.leaves(tree))
            leaves = jax.tree.leaves(tree)
            layouts += [of_spec(spec, leaf.shape, rows) for spec, leaf in zip(specs, leaves, strict=True)]
        return trace(program.function, arguments, layouts, rows)

    one, two = (traced(n * program.unit * program.shared) for n in (1, 2))
    return one, two, traced(program.unit) if program.shared > 1 else one


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A stage's share of a step.

    Attributes:
      name: of the stage.
      flops: of all chips.
      seconds: floor by resource: "compute", "memory", "interconnect"; what takes longest sets the floor.
      temporaries: bytes a chip while it runs.
      collectives: bytes a chip by kind.
    """

    name: str
    flops: float
    seconds: Mapping[str, float]
    temporaries: float
    collectives: Mapping[str, float]

    @property
    def bound(self) -> str:
        """The resource that sets the floor."""
        return max(self.seconds, key=lambda resource: self.seconds[resource])

    @property
    def floor(self) -> float:
        """Seconds."""
        return max(self.seconds.values())


@dataclasses.dataclass(frozen=True)
class Plan:
    """A job on a topology.

    Attributes:
      topology: the chips.
      meshes: abstract.
      resident: what -> bytes a chip, from start to end.
      stages: in order.
      changes: config key -> value, what the plan sets differently from the config.
      videos: a step.
      pairs: a step, at most.
    """

    topology: Topology
    meshes: Meshes
    resident: Mapping[str, float]
    stages: tuple[StagePlan, ...]
    changes: Mapping[str, Any]
    videos: int
    pairs: int

    @property
    def peak(self) -> float:
        """Bytes a chip."""
        return sum(self.resident.values()) + max(stage.temporaries for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether the peak stays below the usable part of the memory."""
        return self.peak <= USABLE * self.topology.chip.memory

    @property
    def seconds(self) -> float:
        """Floor of a step."""
        return sum(stage.floor for stage in self.stages)

    @property
    def largest(self) -> tuple[str, float]:
        """What takes most of a chip's memory."""
        stage = max(self.stages, key=lambda stage: stage.temporaries)
        parts = {**self.resident, f"temporaries of {stage.name}": stage.temporaries}
        return max(parts.items(), key=lambda part: part[1])

    def videos_an_hour(self, utilisation: float) -> float:
        """Sampled, scored and trained on, at this share of the floor's speed."""
        return self.videos * 3600 * utilisation / self.seconds

    def cost_a_thousand_pairs(self, price: float, utilisation: float) -> float:
        """At `price` a device and hour, if every pair is kept."""
        hours = self.seconds / utilisation / 3600
        return 1000 / self.pairs * hours * self.topology.count * price


def abstract_meshes(axes: Mapping[str, Any], count: int, scoring: int = 0) -> Meshes:
    """The meshes that a config's `mesh` makes of `count` devices and `scoring` others, of no devices.

    Raises UserError when the sizes do not fit.
    """
    return Meshes(*(abstract_mesh(**sizes) for sizes in sizes_by_role(axes, count, scoring)))


def shard_bytes(tree: Tree, shardings: Tree) -> float:
    """Bytes of the tree that one device holds."""

    def of_leaf(leaf: Any, sharding: Any) -> float:
        shape = sharding.shard_shape(leaf.shape)
        return float(np.prod(shape, dtype=np.float64)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, tree, shardings)))


def make_plan(
    job: Job,
    lines: Lines,
    topology: Topology,
    meshes: Meshes,
    changes: Mapping[str, Any] | None = None,
    known: dict[Any, Any] | None = None,
) -> Plan:
    """The plan of a job on meshes; `changes` may set rollout.microbatch and train.microbatch.

    The batch is sharded over data and fsdp; what context and tensor divide of a stage's work, its programs say
    (`planning.layout`). `known` caches what several plans of one job share.
    """
    changes, known = dict(changes or {}), {} if known is None else known
    resident = resident_bytes(job, meshes, known)
    trained = bytes_of(job.policy.initial)

    stages = []
    for program in job.programs:
        microbatch = _microbatch(program, changes)
        source = meshes.update if program.mesh == "rollout" else None
        key = program.name, getattr(meshes, program.mesh), source, microbatch, topology
        if key not in known:
            known[key] = _stage(
                program, lines, topology, meshes, microbatch, partial(_bytes_held, job, known), resident, trained
            )
        stages.append(known[key])
    pairs = job.config.train.prompts_per_step
    return Plan(topology, meshes, resident, tuple(stages), changes, pairs * job.config.rollout.candidates, pairs)


def _stage(
    program: Program,
    lines: Lines,
    topology: Topology,
    meshes: Meshes,
    microbatch: int,
    held: Callable[[str, AbstractMesh], float],
    resident: Mapping[str, float],
    trained: float,
) -> StagePlan:
    mesh = getattr(meshes, program.mesh).shape
    parts = mesh["data"] * mesh["fsdp"]
    chunks = program.calls * program.batch / microbatch
    cost = lines.on(program.name, mesh).at(microbatch / parts)
    whole = lines.on(program.name, {}).at(microbatch)
    collectives: dict[str, float] = {}
    if mesh["fsdp"] > 1:
        share = (mesh["fsdp"] - 1) / mesh["fsdp"] / mesh["tensor"]
        collectives["all-gather"] = program.passes * chunks * program.weights * share
    copied = 0.0
    if program.mesh == "rollout" and _weight_layout(meshes.rollout) != _weight_layout(meshes.update):
        # A copy of the weights in the sampler's own sharding, made once a step and freed after the rollout.
        weights = ("frozen backbone", "initial policy")
        copied = sum(held(name, meshes.rollout) for name in weights)
        if program.name == "rollout":  # a branch finds it there
            moved = max(0.0, copied - sum(resident[name] for name in weights))
            collectives["all-gather"] = collectives.get("all-gather", 0.0) + moved
    if parts > 1 and program.trains:
        collectives["all-reduce"] = chunks * 2 * trained * (parts - 1) / parts
    if cost.sent:
        collectives["context and tensor"] = chunks * cost.sent
    seconds = {
        "compute": chunks * cost.flops / topology.chip.flops,
        "memory": chunks * cost.traffic / topology.chip.bandwidth,
        "interconnect": sum(collectives.values()) / topology.interconnect,
    }
    return StagePlan(program.name, chunks * whole.flops, seconds, copied + cost.temporaries, collectives)


def _microbatch(program: Program, changes: Mapping[str, Any]) -> int:
    """Rows at a time, where a plan may set the config's microbatches differently."""
    rows = program.microbatch
    if program.microbatch_key in changes:
        rows = changes[program.microbatch_key] * (2 if program.microbatch_key == "train.microbatch" else 1)
    return fit_microbatch(rows, program.batch)


def resident_bytes(job: Job, meshes: Meshes, known: dict[Any, Any]) -> dict[str, float]:
    """Bytes of a device by what lies there from start to end."""
    return {name: _bytes_held(job, known, name, getattr(meshes, role)) for name, (_, role) in job.resident.items()}


def _bytes_held(job: Job, known: dict[Any, Any], name: str, mesh: AbstractMesh) -> float:
    key = name, tuple(mesh.shape.values())
    if key not in known:
        known[key] = _held(job, job.resident[name][0], mesh)
    size: float = known[key]
    return size


def _held(job: Job, tree: Tree, mesh: Any) -> float:
    """Bytes of parameters or of a training state on one device of the mesh."""
    rules = job.pipeline.family.sharding_rules
    if isinstance(tree, TrainState):
        return shard_bytes(tree, infer_state_shardings(tree, mesh, job.infer_algorithm, rules))
    return shard_bytes(tree, infer_shardings(tree, mesh, rules))


def _weight_layout(mesh: AbstractMesh) -> tuple[int, ...]:
    """Equal for two meshes of the same devices where both shard parameters alike."""
    return tuple(mesh.shape.values()) if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1 else ()


def make_split_plan(job: Job, lines: Lines, topology: Topology, meshes: Meshes) -> tuple[Plan, Plan, Plan]:
    """Plans of the devices that train, of the `reward.devices` that score, and of both.

    Both work at the same time, so the slower one sets the step's floor.
    """
    scoring = job.config.reward.devices
    train, score = (
        make_plan(job.of(role), lines, dataclasses.replace(topology, name=f"{n} that {role}", count=n), meshes)
        for role, n in {"train": topology.count - scoring, "score": scoring}.items()
    )
    slower = train if train.seconds >= score.seconds else score
    return train, score, dataclasses.replace(slower, topology=topology)
