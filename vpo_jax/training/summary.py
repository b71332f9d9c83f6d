"""The text that a run prints at its start and at its end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpo_jax.data.prompts import longer_than
from vpo_jax.evaluation.trend import describe_trend, reward_trend
from vpo_jax.pipeline import Pipeline
from vpo_jax.rewards.combine import dimension_names, parse_weights
from vpo_jax.runtime.mesh import AXES, Meshes
from vpo_jax.runtime.trees import count
from vpo_jax.training.policy import Policy

PHASES = ("rollout", "score", "update")


def describe_start(
    config: Any,
    pipeline: Pipeline,
    policy: Policy,
    rewards: Sequence[Any],
    held_out: Sequence[Any],
    meshes: Meshes,
    prompts: Sequence[str],
    held_out_prompts: Sequence[str],
    report: Path,
) -> str:
    """The block of lines at a run's start; `policy` may hold shapes. A run that continues prints a line of its own."""
    frames, height, width = pipeline.video_size(*(config.rollout[k] for k in ("num_frames", "height", "width")))
    sizes = ", ".join(f"{name} {short(count(tree))}" for name, tree in pipeline.params.items())
    method = f"LoRA of rank {config.lora.rank}" if config.lora.rank else "every weight"
    train = config.train
    lines = {
        "model": f"{config.model.path} ({sizes} parameters), {frames} frames of {height}x{width}, {config.model.dtype}",
        "trains": f"{method}, {short(count(policy.initial))} parameters, by {config.algorithm.name}"
        f" ({config.preference.pairs})",
        "training prompts": _prompts(prompts, pipeline),
        "held-out prompts": _prompts(held_out_prompts, pipeline),
        "training scorers": _weights(config, rewards),
        "held-out scorers": ", ".join(scorer.name for scorer in held_out) or "none: name one in held_out.scorers",
        "devices": f"{meshes.update.size} x {meshes.update.devices.flat[0].device_kind}{_mesh(meshes)}",
        "steps": f"{train.steps}, each {train.prompts_per_step} prompts x {config.rollout.candidates}"
        f" candidates, {train.updates_per_step} update{'s' if train.updates_per_step > 1 else ''}",
        "report": str(report),
    }
    return "\n".join(f"{name:<16}  {value}" for name, value in lines.items())


def _prompts(prompts: Sequence[str], pipeline: Pipeline) -> str:
    first = prompts[0] if len(prompts[0]) <= 60 else prompts[0][:57] + "..."
    said = f"{len(prompts)}, the first: {first!r}"
    length = pipeline.family.text_length
    longer = longer_than(prompts, pipeline.count_tokens, length)
    if longer.number:
        of = "" if longer.looked_at == len(prompts) else f" of {longer.looked_at} checked"
        said += f"; {longer.number}{of} have more than {length} tokens and lose their last words"
    return said


def _weights(config: Any, rewards: Sequence[Any]) -> str:
    weights = parse_weights(config.reward.weights, rewards)
    pairs = zip(dimension_names(rewards), weights, strict=True)
    return ", ".join(f"{name} {weight:.3g}" for name, weight in pairs)


def _mesh(meshes: Meshes) -> str:
    if meshes.update.size == 1 and not meshes.apart:
        return ""
    roles = {"update": meshes.update, "rollout": meshes.rollout, "score": meshes.score}
    said = {role: "x".join(str(mesh.shape[axis]) for axis in AXES) for role, mesh in roles.items()}
    if len(set(said.values())) == 1:
        return f", {' x '.join(AXES)} = {said['update']}"
    return f", {' x '.join(AXES)}: " + ", ".join(f"{role} {shape}" for role, shape in said.items())


def describe_end(lines: Sequence[Mapping[str, Any]], videos: int) -> str:
    """Whether the rollouts' own reward rose, and where the time went, from the lines of metrics.jsonl.

    `videos` is their number in a step.
    """
    said = []
    found = reward_trend(lines)
    if found is not None:
        said.append(describe_trend(found))
    steps = [line for line in lines if line.get("time/step")]
    total = sum(line["time/step"] for line in steps)
    if total:
        seconds = {phase: sum(line.get(f"time/{phase}") or 0.0 for line in steps) for phase in PHASES}
        rest = total - sum(seconds.values())
        parts = ", ".join(f"{phase} {value:.0f} s" for phase, value in (seconds | {"the rest": rest}).items())
        pairs = sum(line.get("pair/kept") or 0.0 for line in steps)
        said.append(
            f"{total:.0f} s in {len(steps)} steps: {parts}; {3600 * videos * len(steps) / total:,.0f} videos and"
            f" {3600 * pairs / total:,.0f} pairs an hour"
        )
    return "\n".join(said)


def short(number: float) -> str:
    """A number of parameters for people: 2.04M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
