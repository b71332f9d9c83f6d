"""Plans as tables and as JSON."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from vpo_jax.planning.chips import USABLE
from vpo_jax.planning.compiled import Compiled
from vpo_jax.planning.fit import Plan
from vpo_jax.planning.job import Job
from vpo_jax.planning.propose import MOST
from vpo_jax.runtime.mesh import Meshes
from vpo_jax.runtime.trees import count


def describe_job(job: Job) -> str:
    """Parameters and sizes, some lines."""
    frames, height, width = job.size
    params = {name: count(tree) for name, tree in job.pipeline.params.items()}
    scorers = {reward.name: count(reward.params) for reward in job.rewards}
    listed = ", ".join(f"{name} {_number(n)}" for name, n in (params | scorers).items())
    config = job.config
    trained = "LoRA of rank " + str(config.lora.rank) if config.lora.rank else "every weight of the denoiser"
    return (
        f"parameters: {listed}\n"
        f"trained: {trained}, {_number(count(job.policy.initial))} parameters; compute in {config.model.dtype}\n"
        f"a step: {config.train.prompts_per_step} prompts x {config.rollout.candidates} candidates of {frames} frames"
        f" {height}x{width}, {config.rollout.num_inference_steps} sampling steps,"
        f" {config.train.updates_per_step} updates"
    )


def plan_tables(plan: Plan) -> Iterator[Table | str]:
    """The plan of one mesh: bytes, stages, and whether it fits."""
    chip = plan.topology.chip
    memory = Table("a chip's memory", "GB", title=f"{plan.topology.name}: {_spell(plan.meshes)}")
    for name, size in plan.resident.items():
        memory.add_row(name, _gb(size))
    widest = max(plan.stages, key=lambda stage: stage.temporaries)
    memory.add_row(f"temporaries, at most ({widest.name}; estimated)", _gb(widest.temporaries))
    memory.add_row("peak", _gb(plan.peak))
    memory.add_row(f"of {_gb(chip.memory)}, usable", _gb(USABLE * chip.memory))
    yield memory

    stages = Table("a step's stage", "TFLOP", "floor, s", "set by", "temporaries, GB", "collectives a chip, GB")
    for stage in plan.stages:
        sent = ", ".join(f"{kind} {_gb(size)}" for kind, size in stage.collectives.items()) or "none"
        flops = f"{stage.flops / 1e12:,.3f}"
        stages.add_row(stage.name, flops, f"{stage.floor:.4g}", stage.bound, _gb(stage.temporaries), sent)
    yield stages

    if plan.fits:
        yield "fits"
    else:
        what, size = plan.largest
        yield (
            f"does not fit: {_gb(plan.peak)} GB a chip, and {_gb(USABLE * chip.memory)} are usable; the most is"
            f" {what}, {_gb(size)} GB"
        )


def result_text(plan: Plan, price: float, utilisation: float) -> str:
    """The floor of a step, and what comes out of it."""
    result = _result(plan, price, utilisation)
    return f"floor of a step: {plan.seconds:.4g} s; at {utilisation:.0%} of that speed: {result}"


def proposals_text(
    proposals: Mapping[str, Plan | None],
    price: float,
    utilisation: float,
    title: str = "smallest mesh that holds the job",
) -> str:
    """A mesh of each kind of chip with the flags that make it; where none holds the job, what the nearest lacks."""
    lines = [f"{title}:"]
    for name, plan in proposals.items():
        if plan is None:
            lines.append(f"  {name}: no mesh up to {MOST} devices divides the batch (train.prompts_per_step)")
            continue
        flags = " ".join(f"--config.{key}={value}" for key, value in plan.changes.items())
        if plan.fits:
            result = f"{_gb(plan.peak)} GB a chip, floor {plan.seconds:.4g} s, {_result(plan, price, utilisation)}"
        else:
            stage = max(plan.stages, key=lambda stage: stage.temporaries)
            usable = _gb(USABLE * plan.topology.chip.memory)
            result = (
                f"does not fit, the nearest that was found: {stage.name} needs {_gb(stage.temporaries)} GB beside"
                f" {_gb(plan.peak - stage.temporaries)} GB of weights and state, and {usable} GB are usable"
            )
        lines += [f"  {plan.topology.name}, {_spell(plan.meshes)}: {result}", f"    {flags or 'the config as it is'}"]
    return "\n".join(lines)


def compiled_table(compiled: Mapping[str, Compiled], plan: Plan) -> Table:
    """What the compiler says beside what the formulas say."""
    table = Table(
        "compiled stage", "arguments, GB", "temporaries, GB", "(estimated)", "collectives, GB", "compiled in, s",
        title="ahead of time, a chip; a loop's collectives count once",
    )  # fmt: skip
    estimated = {stage.name: stage.temporaries for stage in plan.stages}
    for name, result in compiled.items():
        sent = ", ".join(f"{kind} {_gb(size)}" for kind, size in result.collectives.items()) or "none"
        sizes = _gb(result.arguments), _gb(result.temporaries), _gb(estimated[name])
        table.add_row(name, *sizes, sent, f"{result.seconds:.0f}")
    return table


def plan_as_json(plan: Plan | None) -> dict[str, Any] | None:
    """The plan's numbers."""
    if plan is None:
        return None
    return {
        "topology": plan.topology.name,
        "devices": plan.topology.count,
        "mesh": dict(plan.meshes.update.shape),
        "rollout_mesh": dict(plan.meshes.rollout.shape),
        "score_mesh": dict(plan.meshes.score.shape),
        "changes": dict(plan.changes),
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "memory_bytes": plan.topology.chip.memory,
        "resident_bytes": dict(plan.resident),
        "seconds": plan.seconds,
        "stages": {
            stage.name: {
                "flops": stage.flops,
                "seconds": dict(stage.seconds),
                "bound": stage.bound,
                "temporary_bytes": stage.temporaries,
                "collective_bytes": dict(stage.collectives),
            }
            for stage in plan.stages
        },
    }


def _result(plan: Plan, price: float, utilisation: float) -> str:
    text = f"{plan.videos_an_hour(utilisation):,.0f} videos an hour"
    return f"{text}, {plan.cost_a_thousand_pairs(price, utilisation):,.2f} a thousand pairs" if price else text


def _spell(meshes: Meshes) -> str:
    def sizes(mesh: Any) -> str:
        return " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())

    own = {role: getattr(meshes, role) for role in ("rollout", "score") if getattr(meshes, role) != meshes.update}
    return "; ".join([sizes(meshes.update), *(f"{role} {sizes(mesh)}" for role, mesh in own.items())])


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3g}" if size < 1e12 else f"{size / 1e9:,.0f}"


def _number(n: int) -> str:
    return f"{n / 1e6:,.1f} M" if n >= 1e5 else f"{n:,}"
