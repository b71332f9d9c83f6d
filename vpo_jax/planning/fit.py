"""A job on a mesh of chips: bytes, the floor of a step's time, and the smallest mesh that holds it."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from vpo_jax.planning.chips import USABLE, Topology
from vpo_jax.planning.cost import Cost, measure
from vpo_jax.planning.job import Job, Stage
from vpo_jax.runtime.mesh import AXES, infer_shardings, mesh_sizes
from vpo_jax.runtime.trees import bytes_of
from vpo_jax.training.state import PARAMETER_RULES, infer_state_shardings

Tree = Any
MOST = 256  # devices that are tried


@dataclasses.dataclass(frozen=True)
class Linear:
    """Cost of a stage as a straight line: once a call, and for each of the batch."""

    once: Cost
    each: Cost

    def at(self, batch: float) -> Cost:
        """Cost of a call with this batch."""
        return Cost(*(a + b * batch for a, b in zip(self.once, self.each, strict=True)))


def measure_stages(job: Job) -> dict[str, Linear]:
    """Costs by stage, from the real functions at batch 1 and 2."""
    lines = {}
    for stage in job.stages:
        one, two = (measure(*_call(stage, batch)) for batch in (1, 2))
        each = Cost(*(max(0.0, b - a) for a, b in zip(one, two, strict=True)))
        lines[stage.name] = Linear(Cost(*(max(0.0, a - e) for a, e in zip(one, each, strict=True))), each)
    return lines


def _call(stage: Stage, batch: int) -> tuple:
    function, arguments = stage.build(batch)
    return function, *arguments


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
      mesh: axis -> size.
      resident: what -> bytes a chip, from start to end.
      stages: in order.
      changes: config key -> value, what the plan sets differently from the config.
      clips: a step.
      pairs: a step, at most.
    """

    topology: Topology
    mesh: Mapping[str, int]
    resident: Mapping[str, float]
    stages: tuple[StagePlan, ...]
    changes: Mapping[str, Any]
    clips: int
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
        return self.clips * 3600 * utilisation / self.seconds

    def cost_a_thousand_pairs(self, price: float, utilisation: float) -> float:
        """At `price` a device and hour, were every pair kept."""
        hours = self.seconds / utilisation / 3600
        return 1000 / self.pairs * hours * self.topology.count * price


def abstract_mesh(sizes: Mapping[str, int]) -> Any:
    """A mesh of no devices."""
    return AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


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
    mesh: Mapping[str, int],
    changes: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of a job on a mesh; `changes` may set rollout.microbatch and train.microbatch.

    The batch is taken to be cut over data and fsdp, and a stage's work over context and tensor too.
    """
    changes = dict(changes or {})
    parts, inner = mesh["data"] * mesh["fsdp"], mesh["context"] * mesh["tensor"]
    abstract = abstract_mesh(mesh)
    resident = {}
    for name, (tree, role) in job.resident.items():
        if role == "whole":
            resident[name] = float(bytes_of(tree))
        else:
            state = role == "state"
            shardings = (
                infer_state_shardings(tree, abstract) if state else infer_shardings(tree, abstract, PARAMETER_RULES)
            )
            resident[name] = shard_bytes(tree, shardings)
    trained = bytes_of(job.policy.start)

    stages = []
    for stage in job.stages:
        key = "rollout.microbatch" if stage.name in ("rollout", "decode") or stage.name.startswith("score") else ""
        key = "train.microbatch" if stage.name in ("errors", "update") else key
        microbatch = changes.get(key, stage.microbatch) or stage.batch
        chunks = stage.calls * stage.batch / microbatch
        cost = lines[stage.name].at(microbatch / parts)
        whole = lines[stage.name].at(microbatch)
        collectives: dict[str, float] = {}
        if mesh["fsdp"] > 1 and stage.weights:
            share = (mesh["fsdp"] - 1) / mesh["fsdp"] / mesh["tensor"]
            collectives["all-gather"] = stage.passes * chunks * stage.weights * share
        if parts > 1 and stage.name == "update":
            collectives["all-reduce"] = chunks * 2 * trained * (parts - 1) / parts
        seconds = {
            "compute": chunks * cost.flops / inner / topology.chip.flops,
            "memory": chunks * cost.traffic / inner / topology.chip.bandwidth,
            "interconnect": sum(collectives.values()) / topology.interconnect,
        }
        stages.append(StagePlan(stage.name, chunks * whole.flops, seconds, cost.temporaries / inner, collectives))
    pairs = job.config.train.prompts_per_step
    return Plan(topology, mesh, resident, tuple(stages), changes, pairs * job.config.rollout.candidates, pairs)


def make_split_plan(
    job: Job, lines: Mapping[str, Linear], topology: Topology, mesh: Mapping[str, int]
) -> tuple[Plan, Plan, Plan]:
    """Plans of the devices that train, of the `reward.devices` that score, and of both.

    They work side by side, so the slower sets the step's floor. `mesh` is that of those that train.
    """
    scoring = job.config.reward.devices
    parts = {"train": (topology.count - scoring, mesh), "score": (scoring, mesh_sizes(scoring))}
    train, score = (
        make_plan(job.of(role), lines, dataclasses.replace(topology, name=f"{n} that {role}", count=n), sizes)
        for role, (n, sizes) in parts.items()
    )
    slower = train if train.seconds >= score.seconds else score
    return train, score, dataclasses.replace(slower, topology=topology)


def propose(job: Job, lines: Mapping[str, Linear], chip: Any, most: int = MOST) -> Plan | None:
    """The smallest mesh of `chip` that holds the job; None where none up to `most` devices does.

    The config is kept where it can be; else one clip and one pair a device at a time, which costs no work.
    """
    best = None
    for topology in _sizes(chip, most):
        for changes in ({}, {"rollout.microbatch": topology.count, "train.microbatch": topology.count}):
            for fsdp in _powers(topology.count):
                mesh = {"data": topology.count // fsdp, "fsdp": fsdp, "context": 1, "tensor": 1}
                if not divides(job.config, topology.count, changes):
                    continue
                plan = make_plan(job, lines, topology, mesh, changes)
                if plan.fits and (best is None or plan.seconds < best.seconds):
                    best = plan
            if best is not None:
                return best
    return None


def divides(config: Any, parts: int, changes: Mapping[str, Any]) -> bool:
    """Whether `parts` cuts the batches evenly."""
    clips = config.train.prompts_per_step * config.rollout.candidates
    rollout = changes.get("rollout.microbatch", config.rollout.microbatch)
    train = changes.get("train.microbatch", config.train.microbatch)
    whole = config.train.prompts_per_step % parts == 0
    cut = all(size % parts == 0 for size in (rollout, train))
    fills = (not rollout or clips % rollout == 0) and (not train or config.train.prompts_per_step % train == 0)
    return whole and cut and fills


def _sizes(chip: Any, most: int) -> Iterator[Topology]:
    for count in _powers(most):
        yield Topology(f"{count} x {chip.name}", chip, count)


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]
