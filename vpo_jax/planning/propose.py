"""The meshes of a kind of chip that hold a job: the smallest, and the fastest of its size."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vpo_jax.planning.chips import USABLE, Chip, Topology
from vpo_jax.planning.fit import Lines, Plan, make_plan, resident_bytes
from vpo_jax.planning.job import Job
from vpo_jax.runtime.mesh import AXES, Meshes, abstract_mesh

MOST = 256  # devices that are tried
_MOST_TENSOR = 8  # tensor exchanges activations in every layer: within a node of GPUs


def propose(job: Job, lines: Lines, chip: Chip, counts: Sequence[int] = ()) -> Plan | None:
    """The smallest mesh of `chip` that holds the job, with the fastest floor of those of its size.

    Its meshes have powers of two of data, fsdp, context and tensor; sampling and scoring may have their own. The config
    is kept where that costs less than 1 % of the floor; else one video and one pair at a time in each part of a batch.

    Args:
      job: the job.
      lines: its programs' costs.
      chip: of all devices.
      counts: numbers of devices to try, in this order; none: powers of two up to `MOST`.

    Returns:
      Where no mesh holds the job, the plan that lacks least memory (`Plan.fits` says so); None where no mesh divides
      the batch.
    """
    known: dict[Any, Any] = {}
    nearest = None
    for count in counts or _powers(MOST):
        topology = Topology(f"{count} x {chip.name}", chip, count)
        best = None
        for meshes, changes in _choices(job, count):
            held = sum(resident_bytes(job, meshes, known).values())
            if nearest is not None and held > max(nearest.peak, USABLE * chip.memory):
                continue  # its stages need not be known
            plan = make_plan(job, lines, topology, meshes, changes, known)
            if nearest is None or plan.peak < 0.99 * nearest.peak:
                nearest = plan
            if plan.fits and (best is None or plan.seconds < 0.99 * best.seconds):
                best = plan
        if best is not None:
            return best
    return nearest


def _choices(job: Job, count: int) -> Iterator[tuple[Meshes, dict[str, Any]]]:
    """Meshes of `count` devices and the config keys that make them, simple ones first."""
    config = job.config
    length = job.pipeline.family.context_length(*job.size)
    found = []
    scorers = [(n, 1, 1) for n in _powers(count) if count % n == 0]
    for update in _shapes(count, length):
        _, context, tensor = update
        whole = dict.fromkeys((update, (1, context, tensor), (1, 1, 1)))
        for rollout, score in itertools.product(whole, dict.fromkeys((update, *scorers))):
            every = update, rollout, score
            axes: dict[str, Any] = {
                f"mesh.{axis}": size for axis, size in zip(AXES[1:], update, strict=True) if size != config.mesh[axis]
            }
            if config.mesh.data != -1:
                axes["mesh.data"] = -1
            for role, sizes in (("rollout", rollout), ("score", score)):
                own = "" if sizes == update else _spell(sizes)
                axes |= {f"mesh.{role}": own} if own != config.mesh[role] else {}
            meshes = Meshes(*(abstract_mesh(count // math.prod(sizes), *sizes) for sizes in every))
            trains, samples, scores = (mesh.shape["data"] * mesh.shape["fsdp"] for mesh in meshes)
            smaller = {"rollout.microbatch": max(samples, scores), "train.microbatch": trains}
            for changes in ({}, {key: size for key, size in smaller.items() if size != _of(config, key)}):
                if divides(config, trains, samples, scores, changes):
                    axes_used = sum(size > 1 for size in update)
                    found.append((axes_used + len({*every}) + bool(changes), meshes, changes | axes))
    for _, meshes, changes in sorted(found, key=lambda choice: choice[0]):
        yield meshes, changes


def _shapes(count: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Sizes of fsdp, context and tensor on `count` devices; context divides a video's length."""
    for fsdp, context, tensor in itertools.product(_powers(count), _powers(count), _powers(min(count, _MOST_TENSOR))):
        if count % (fsdp * context * tensor) == 0 and length % context == 0:
            yield fsdp, context, tensor


def _spell(sizes: tuple[int, int, int]) -> str:
    return ",".join(f"{axis}={n}" for axis, n in zip(AXES[1:], sizes, strict=True) if n > 1) or "data=-1"


def _of(config: Any, key: str) -> Any:
    section, _, name = key.partition(".")
    return config[section][name]


def divides(config: Any, trains: int, samples: int, scores: int, changes: Mapping[str, Any]) -> bool:
    """Whether the parts of each role's batch divide batches and microbatches, and these divide the batches."""
    prompts = config.train.prompts_per_step
    videos = prompts * config.rollout.candidates
    rollout = changes.get("rollout.microbatch", config.rollout.microbatch)
    train = changes.get("train.microbatch", config.train.microbatch)
    fills = (not rollout or videos % rollout == 0) and (not train or prompts % train == 0)
    sampled = all(size % parts == 0 for size in (rollout, videos) for parts in (samples, scores))
    return fills and sampled and prompts % trains == 0 and train % trains == 0


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]
