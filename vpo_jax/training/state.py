"""Everything that a run carries from one step to the next, as one pytree of arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from vpo_jax.rewards.combine import RewardStatistics, init_statistics
from vpo_jax.runtime.mesh import PARAMETER_RULES, VIDEO, Rules, batch_sharding, infer_shardings, replicated
from vpo_jax.training.pairs import Pairs, empty_buffer
from vpo_jax.training.reference import Curriculum, init_curriculum

Tree = Any


class TrainState(NamedTuple):
    """The state of a run after `step` steps.

    Attributes:
      step: int32 scalar, steps completed.
      policy: adapters theta, float32.
      reference: adapters phi, of theta's shape from the first step on.
      ema: average of theta, or {} when it is off.
      optimizer: optax's state.
      statistics: the rewards' pooled variance.
      curriculum: what decides when the reference is refreshed.
      buffer: pairs of the last steps_kept + 1 steps.
      waiting: the next step's candidates where they are made while this step's are scored, else {}.
      watched: the first step's pairs, on which P(e_w rises) is measured.
      finite: bool scalar; False once a loss or gradient was not finite, and nothing is updated from then on.
      precise: bool scalar; True once rounding in u was seen to be too large and errors are taken in float32.
    """

    step: jax.Array
    policy: Tree
    reference: Tree
    ema: Tree
    optimizer: optax.OptState
    statistics: RewardStatistics
    curriculum: Curriculum
    buffer: Pairs
    waiting: Tree
    watched: Pairs
    finite: jax.Array
    precise: jax.Array

    def weights(self) -> Tree:
        """The adapters that people get: the average where there is one, else the policy."""
        return self.ema if jax.tree.leaves(self.ema) else self.policy


def init_state(
    start: Tree,
    optimizer: optax.GradientTransformation,
    pairs: Pairs,
    num_dimensions: int,
    steps_kept: int = 0,
    with_ema: bool = False,
    waiting: Tree | None = None,
) -> TrainState:
    """The state before the first step; policy, reference and average are copies of `start`, in buffers of their own.

    `pairs` gives the shapes and dtypes of a step's pairs (arrays or ShapeDtypeStruct), `waiting` those of a step's
    candidates where they are made ahead.
    """

    def copy() -> Tree:
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), start)

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        policy=copy(),
        reference=copy(),
        ema=copy() if with_ema else {},
        optimizer=optimizer.init(start),
        statistics=init_statistics(num_dimensions),
        curriculum=init_curriculum(),
        buffer=empty_buffer(pairs, steps_kept),
        waiting=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), waiting or {}),
        watched=empty_buffer(pairs, 0),
        finite=jnp.array(True),
        precise=jnp.array(False),
    )


def infer_state_shardings(state: TrainState, mesh: Mesh, rules: Rules = PARAMETER_RULES) -> TrainState:
    """Shardings of a state: parameters and moments by the rules, pairs over data and fsdp, the rest on every device.

    `state` may hold arrays or ShapeDtypeStruct.
    """
    whole = jax.tree.map(lambda _: replicated(mesh), state)
    by_rules = {
        name: infer_shardings(getattr(state, name), mesh, rules) for name in ("policy", "reference", "ema", "optimizer")
    }
    pairs = {name: jax.tree.map(lambda _: batch_sharding(mesh), getattr(state, name)) for name in ("buffer", "watched")}
    pairs["waiting"] = jax.tree.map(lambda _: NamedSharding(mesh, VIDEO), state.waiting)
    return whole._replace(**by_rules, **pairs)
