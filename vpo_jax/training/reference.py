"""The reference phi: frozen, refreshed to the policy (the paper's curriculum), an average of it, or adaptive."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vpo_jax.algorithms.state import Curriculum, TrainState
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.transfers import allowed

Tree = Any
SCHEDULES = ("frozen", "refresh", "ema", "adaptive")
# Least implicit accuracy at which an adaptive reference is refreshed: the policy has learned most pairs against it.
HIGH_ACCURACY = 0.7


def make_reference(schedule: str, every: int, decay: float) -> Callable[[TrainState, int, float | None], TrainState]:
    """`update_reference(state, step, gain) -> state`, called after each step.

    Args:
      schedule: "frozen"; "refresh" (a copy of the policy every `every` steps, K in the paper); "ema"
        (phi = decay phi + (1 - decay) theta after each step); "adaptive" (a copy at an evaluation, where implicit
        accuracy since the last one is high, at least `every` steps have passed and the held-out gain has not fallen).
      every: steps.
      decay: of "ema".

    `step` counts completed steps, on the host: the state's own would wait for the devices. `gain` is the held-out
    scorers' at this step's evaluation, else None: the policy that is copied is the evaluated one.
    A refreshed reference has buffers of its own, because the next update donates the policy's.

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

    def update_reference(state: TrainState, step: int, gain: float | None = None) -> TrainState:
        if schedule == "ema":
            return state._replace(reference=blend(state.reference, state.policy))
        if schedule == "frozen":
            return state
        due = step % every == 0 if schedule == "refresh" else gain is not None and _due(state, step, every, gain)
        if not due:
            return state
        with allowed():
            curriculum = _refreshed(state.curriculum, step, gain)
        return state._replace(reference=_copy(state.policy), curriculum=curriculum)

    return update_reference


def _due(state: TrainState, step: int, every: int, gain: float) -> bool:
    curriculum = jax.device_get(state.curriculum)
    if step - int(curriculum.refreshed_at) < every or float(curriculum.pairs) == 0.0:
        return False
    accuracy = float(curriculum.correct) / float(curriculum.pairs)
    return accuracy >= HIGH_ACCURACY and gain >= float(curriculum.held_out)


def _copy(policy: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.array(x, copy=True), policy)


def _refreshed(curriculum: Curriculum, step: int, gain: float | None) -> Curriculum:
    def like(value: float, old: jax.Array) -> jax.Array:
        return jax.device_put(jnp.asarray(value, old.dtype), old.sharding)

    return Curriculum(
        correct=like(0.0, curriculum.correct),
        pairs=like(0.0, curriculum.pairs),
        held_out=curriculum.held_out if gain is None else like(gain, curriculum.held_out),
        refreshed_at=like(step, curriculum.refreshed_at),
        refreshes=curriculum.refreshes + 1,
    )
