"""A job on a mesh of chips: bytes, the floor of a step's time, and the smallest mesh that holds it."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from vpo_jax.algorithms.state import TrainState, infer_state_shardings
from vpo_jax.planning.chips import USABLE, Topology
from vpo_jax.planning.cost import Cost, measure
from vpo_jax.planning.job import Job
from vpo_jax.runtime.mesh import AXES, Meshes, infer_shardings, sizes_by_role
from vpo_jax.runtime.programs import Program
from vpo_jax.runtime.trees import bytes_of

Tree = Any
MOST = 256  # devices that are tried


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


def measure_programs(job: Job) -> dict[str, Linear]:
    """Costs by program, from the real functions at one and two units of rows."""
    lines = {}
    for program in job.programs:
        unit = program.unit * program.shared
        one, two = (measure(program.function, *program.arguments(rows)) for rows in (unit, 2 * unit))
        alone = measure(program.function, *program.arguments(program.unit)) if program.shared > 1 else one
        each = Cost(*(max(0.0, b - a) / unit for a, b in zip(one, two, strict=True)))
        once = Cost(*(max(0.0, a - unit * e) for a, e in zip(one, each, strict=True)))
        lines[program.name] = Linear(once, each, program.shared, alone)
    return lines


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


def abstract_mesh(data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh of no devices."""
    return AbstractMesh((data, fsdp, context, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shard_bytes(tree: Tree, shardings: Tree) -> float:
    """Bytes of the tree that one device holds."""

    def of_leaf(leaf: Any, sharding: Any) -> float:
        shape = sharding.shard_shape(leaf.shape)
        return float(np.prod(shape, dtype=np.float64)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(of_leaf, tree, shardings)))


def make_plan(
    job: Job,
    lines: Mapping[str, Linear],
    topology: Topology,
    meshes: Meshes,
    changes: Mapping[str, Any] | None = None,
    known: dict[Any, float] | None = None,
) -> Plan:
    """The plan of a job on meshes; `changes` may set rollout.microbatch and train.microbatch.

    The plan assumes that the batch is sharded over data and fsdp, and a stage's work over context and tensor too.
    `known` caches the bytes that a device holds, for several plans of one job.
    """
    changes, known = dict(changes or {}), {} if known is None else known
    trees = job.resident

    def held(name: str, mesh: AbstractMesh) -> float:
        key = name, tuple(mesh.shape.values())
        if key not in known:
            known[key] = _held(job, trees[name][0], mesh)
        return known[key]

    resident = {name: held(name, getattr(meshes, role)) for name, (_, role) in trees.items()}
    trained = bytes_of(job.policy.initial)

    stages = []
    for program in job.programs:
        mesh = getattr(meshes, program.mesh).shape
        parts, inner = mesh["data"] * mesh["fsdp"], mesh["context"] * mesh["tensor"]
        microbatch = _microbatch(program, changes)
        chunks = program.calls * program.batch / microbatch
        cost = lines[program.name].at(microbatch / parts)
        whole = lines[program.name].at(microbatch)
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
        seconds = {
            "compute": chunks * cost.flops / inner / topology.chip.flops,
            "memory": chunks * cost.traffic / inner / topology.chip.bandwidth,
            "interconnect": sum(collectives.values()) / topology.interconnect,
        }
        stages.append(
            StagePlan(program.name, chunks * whole.flops, seconds, copied + cost.temporaries / inner, collectives)
        )
    pairs = job.config.train.prompts_per_step
    return Plan(topology, meshes, resident, tuple(stages), changes, pairs * job.config.rollout.candidates, pairs)


def _microbatch(program: Program, changes: Mapping[str, Any]) -> int:
    """Rows at a time, where a plan may set the config's microbatches differently."""
    rows = program.microbatch
    if program.microbatch_key in changes:
        rows = changes[program.microbatch_key] * (2 if program.microbatch_key == "train.microbatch" else 1)
    return rows or program.batch


def _held(job: Job, tree: Tree, mesh: Any) -> float:
    """Bytes of parameters or of a training state on one device of the mesh."""
    rules = job.pipeline.family.sharding_rules
    if isinstance(tree, TrainState):
        return shard_bytes(tree, infer_state_shardings(tree, mesh, job.infer_algorithm, rules))
    return shard_bytes(tree, infer_shardings(tree, mesh, rules))


def _weight_layout(mesh: AbstractMesh) -> tuple[int, ...]:
    """Equal for two meshes of the same devices where both shard parameters alike."""
    return tuple(mesh.shape.values()) if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1 else ()


def make_split_plan(
    job: Job, lines: Mapping[str, Linear], topology: Topology, meshes: Meshes
) -> tuple[Plan, Plan, Plan]:
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


def propose(job: Job, lines: Mapping[str, Linear], chip: Any, most: int = MOST) -> Plan | None:
    """The smallest mesh of `chip` that holds the job; None where none up to `most` devices does.

    The config is kept where it can be; else one video and one pair a device at a time, which adds no work.
    Sampling and scoring get meshes of their own where these lower the floor of a step by 1 % or more.
    """
    known: dict[Any, float] = {}
    for topology in _sizes(chip, most):
        count = topology.count
        for changes in ({}, {"rollout.microbatch": count, "train.microbatch": count}):
            if not divides(job.config, count, changes):
                continue
            best = None
            for update, rollout, score in _fsdp_sizes(count):
                axes: dict[str, Any] = {"mesh.fsdp": update}
                for role, fsdp in (("rollout", rollout), ("score", score)):
                    own = "" if fsdp == update else f"fsdp={fsdp}" if fsdp > 1 else "data=-1"
                    axes |= {f"mesh.{role}": own} if own or job.config.mesh[role] else {}
                meshes = Meshes(*(abstract_mesh(count // fsdp, fsdp) for fsdp in (update, rollout, score)))
                plan = make_plan(job, lines, topology, meshes, changes | axes, known)
                if plan.fits and (best is None or plan.seconds < 0.99 * best.seconds):
                    best = plan
            if best is not None:
                return best
    return None


def _fsdp_sizes(count: int) -> list[tuple[int, int, int]]:
    """Sizes of fsdp to try for (update, rollout, score), the ones of one mesh first."""
    plain = [(fsdp, fsdp, fsdp) for fsdp in _powers(count)]
    mixed = [(u, r, s) for u in _powers(count) for r in {1, u} for s in _powers(count) if (u, r, s) not in plain]
    return plain + mixed


def divides(config: Any, parts: int, changes: Mapping[str, Any]) -> bool:
    """Whether `parts` divides the batches and microbatches, and these divide the batches."""
    videos = config.train.prompts_per_step * config.rollout.candidates
    rollout = changes.get("rollout.microbatch", config.rollout.microbatch)
    train = changes.get("train.microbatch", config.train.microbatch)
    whole = config.train.prompts_per_step % parts == 0
    shards = all(size % parts == 0 for size in (rollout, train))
    fills = (not rollout or videos % rollout == 0) and (not train or config.train.prompts_per_step % train == 0)
    return whole and shards and fills


def _sizes(chip: Any, most: int) -> Iterator[Topology]:
    for count in _powers(most):
        yield Topology(f"{count} x {chip.name}", chip, count)


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]
