"""The reference phi: frozen, refreshed to the policy (the paper's curriculum), an average of it, or adaptive."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vpo_jax.runtime.errors import UserError

Tree = Any
SCHEDULES = ("frozen", "refresh", "ema", "adaptive")
# From this share of pairs on which policy and preference agree, the reference no longer tells them apart well.
HIGH_ACCURACY = 0.7


class Curriculum(NamedTuple):
    """What has happened since the reference was last refreshed.

    Attributes:
      correct: float32, implicit accuracy summed over pairs and updates.
      pairs: float32, how many there were.
      held_out: float32, the held-out judge at the last refresh; -inf before the first.
      refreshed_at: int32, steps completed at the last refresh.
      refreshes: int32.
    """

    correct: jax.Array
    pairs: jax.Array
    held_out: jax.Array
    refreshed_at: jax.Array
    refreshes: jax.Array


def init_curriculum() -> Curriculum:
    """Before the first step."""
    return Curriculum(
        jnp.zeros((), jnp.float32),
        jnp.zeros((), jnp.float32),
        jnp.array(-jnp.inf, jnp.float32),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def make_reference(
    schedule: str, every: int, decay: float
) -> Callable[[Tree, Tree, Curriculum, int, float | None], tuple[Tree, Curriculum]]:
    """`follow(policy, reference, curriculum, step, held_out) -> (reference, curriculum)`, called after each step.

    Args:
      schedule: "frozen"; "refresh" (a copy of the policy every `every` steps, K in the paper); "ema"
        (phi = decay phi + (1 - decay) theta after each step); "adaptive" (a copy at a look, where implicit accuracy
        since the last one is high, at least `every` steps have passed and the held-out judge has not fallen).
      every: steps.
      decay: of "ema".

    `step` counts completed steps; `held_out` is the held-out judge's value at a look, else None.
    A refreshed reference lies in buffers of its own, since the next update gives the policy's away.

    Raises:
      UserError: an unknown schedule, or a number out of range.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"reference.schedule: {schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    if schedule in ("refresh", "adaptive") and every < 1:
        raise UserError(f"reference.every: {every} steps; give 1 or more, or reference.schedule=frozen")
    if schedule == "ema" and not 0.0 <= decay < 1.0:
        raise UserError(f"reference.decay: {decay} is not in [0, 1)")
    blend = jax.jit(
        lambda reference, policy: jax.tree.map(lambda r, p: decay * r + (1.0 - decay) * p, reference, policy)
    )

    def follow(
        policy: Tree, reference: Tree, curriculum: Curriculum, step: int, held_out: float | None = None
    ) -> tuple[Tree, Curriculum]:
        if schedule == "ema":
            return blend(reference, policy), curriculum
        if schedule == "refresh" and step % every == 0:
            return _copy(policy), _refreshed(curriculum, step, held_out)
        if schedule == "adaptive" and held_out is not None and _due(curriculum, step, every, held_out):
            return _copy(policy), _refreshed(curriculum, step, held_out)
        return reference, curriculum

    return follow


def _due(curriculum: Curriculum, step: int, every: int, held_out: float) -> bool:
    if step - int(curriculum.refreshed_at) < every or float(curriculum.pairs) == 0.0:
        return False
    accuracy = float(curriculum.correct) / float(curriculum.pairs)
    return accuracy >= HIGH_ACCURACY and held_out >= float(curriculum.held_out)


def _copy(policy: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.array(x, copy=True), policy)


def _refreshed(curriculum: Curriculum, step: int, held_out: float | None) -> Curriculum:
    def like(value: float, old: jax.Array) -> jax.Array:
        return jax.device_put(jnp.asarray(value, old.dtype), old.sharding)

    return Curriculum(
        correct=like(0.0, curriculum.correct),
        pairs=like(0.0, curriculum.pairs),
        held_out=curriculum.held_out if held_out is None else like(held_out, curriculum.held_out),
        refreshed_at=like(step, curriculum.refreshed_at),
        refreshes=curriculum.refreshes + 1,
    )
