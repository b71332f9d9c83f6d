"""The state of a run from one step to the next, as one pytree of arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vpo_jax.diffusion.trajectory import Trajectory
from vpo_jax.rewards.combine import RewardStatistics, init_statistics
from vpo_jax.runtime.mesh import BATCH, PARAMETER_RULES, VIDEO, Rules, infer_shardings, replicated

Tree = Any


class Curriculum(NamedTuple):
    """What has happened since the reference was last refreshed.

    Attributes:
      correct: float32, implicit accuracy summed over pairs and updates.
      pairs: float32, how many there were.
      held_out: float32, the held-out scorers' gain at the last refresh; -inf before the first.
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


class TrainState(NamedTuple):
    """The state of a run after `step` steps.

    Attributes:
      step: int32 scalar, steps completed.
      policy: trainable parameters theta, float32.
      reference: phi, of theta's shape from the first step on.
      ema: average of theta, or {} where it is off.
      optimizer: optax's state.
      statistics: the rewards' pooled variance.
      curriculum: what decides when the reference is refreshed.
      algorithm: what the algorithm keeps of its own.
      prefetched: the next step's candidates where they are sampled while this step's are scored, else {}.
      finite: bool scalar; False once a loss or gradient was not finite, and nothing is updated from then on.
    """

    step: jax.Array
    policy: Tree
    reference: Tree
    ema: Tree
    optimizer: optax.OptState
    statistics: RewardStatistics
    curriculum: Curriculum
    algorithm: Tree
    prefetched: Tree
    finite: jax.Array

    def advanced(self, prefetched: Tree) -> "TrainState":
        """The state with one step more completed."""
        return self._replace(step=_increment(self.step), prefetched=prefetched)

    def weights(self) -> Tree:
        """The trainable parameters that people get: the average where there is one, else the policy."""
        return self.ema if jax.tree.leaves(self.ema) else self.policy


@jax.jit
def _increment(number: jax.Array) -> jax.Array:
    return number + 1


def init_state(
    initial: Tree,
    optimizer: optax.GradientTransformation,
    init_algorithm: Callable[[Tree], Tree],
    num_dimensions: int,
    with_ema: bool = False,
    prefetched: Tree | None = None,
) -> TrainState:
    """The state before the first step; policy, reference and average are copies of `initial`, in their own buffers.

    `init_algorithm` makes the algorithm's part; `prefetched` gives the shape of a step's candidates where they are
    sampled in advance.
    """

    def copy() -> Tree:
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), initial)

    return TrainState(
        step=jnp.zeros((), jnp.int32),
        policy=copy(),
        reference=copy(),
        ema=copy() if with_ema else {},
        optimizer=optimizer.init(initial),
        statistics=init_statistics(num_dimensions),
        curriculum=init_curriculum(),
        algorithm=init_algorithm(initial),
        prefetched=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), prefetched or {}),
        finite=jnp.array(True),
    )


def infer_state_shardings(
    state: TrainState,
    mesh: Mesh,
    infer_algorithm: Callable[[Tree, Mesh], Tree],
    rules: Rules = PARAMETER_RULES,
) -> TrainState:
    """Shardings of a state: parameters and moments by the rules, the algorithm's part as it says, the rest replicated.

    `state` may hold arrays or ShapeDtypeStruct.
    """
    whole = jax.tree.map(lambda _: replicated(mesh), state)
    by_rules = {
        name: infer_shardings(getattr(state, name), mesh, rules) for name in ("policy", "reference", "ema", "optimizer")
    }
    # A trajectory's second dimension is denoising steps, not frames.
    spec = BATCH if isinstance(state.prefetched, Trajectory) else VIDEO
    return whole._replace(
        **by_rules,
        algorithm=infer_algorithm(state.algorithm, mesh),
        prefetched=infer_shardings(state.prefetched, mesh, (("", spec),)),
    )
