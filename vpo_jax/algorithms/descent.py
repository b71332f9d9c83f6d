"""One step of gradient descent that keeps the old state where a number is not finite."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vpo_jax.algorithms.protocol import Metrics
from vpo_jax.algorithms.state import TrainState
from vpo_jax.runtime.trees import select

Tree = Any


class Trained(NamedTuple):
    """The part of the state that an update changes."""

    policy: Tree
    ema: Tree
    optimizer: optax.OptState
    finite: jax.Array

    @classmethod
    def of(cls, state: TrainState) -> "Trained":
        """That part of a state, or of its shardings."""
        return cls(state.policy, state.ema, state.optimizer, state.finite)


def make_descend(
    gradients: Callable[..., tuple[Tree, Metrics]],
    optimizer: optax.GradientTransformation,
    ema_decay: float = 0.0,
    out_shardings: Any = None,
) -> Callable[..., tuple[Trained, Metrics]]:
    """`descend(trained, frozen, inputs, some, loss) -> (trained, metrics)`, jitted.

    `gradients(frozen, policy, *inputs)` gives the gradient and its own metrics. The old state is kept bitwise where the
    loss, the gradient or the step is not finite, and where `some` is False (nothing to learn from): on a zero gradient
    Adam would still move the weights. A loss of None counts as finite where its gradient is. `trained`'s buffers are
    donated.
    """

    def descend(
        trained: Trained, frozen: Tree, inputs: tuple[Tree, ...], some: jax.Array, loss: jax.Array | None = None
    ) -> tuple[Trained, Metrics]:
        gradient, metrics = gradients(frozen, trained.policy, *inputs)
        norm = optax.global_norm(gradient)
        change, moments = optimizer.update(gradient, trained.optimizer, trained.policy)
        finite = jnp.isfinite(norm) & jnp.isfinite(optax.global_norm(change))
        if loss is not None:
            finite = jnp.isfinite(loss) & finite
        applied = trained.finite & finite & some
        policy = optax.apply_updates(trained.policy, change)
        ema = trained.ema  # {} where it is off
        if ema_decay > 0.0:
            ema = jax.tree.map(lambda a, p: ema_decay * a + (1.0 - ema_decay) * p, ema, policy)
        policy, ema, moments = select(applied, (policy, ema, moments), (trained.policy, trained.ema, trained.optimizer))
        one = jnp.ones((), jnp.float32)
        metrics |= {
            "loss/gradient_norm": (norm, one),
            "loss/applied": (applied.astype(jnp.float32), one),
            "loss/non_finite": ((some & ~finite).astype(jnp.float32), one),
        }
        return Trained(policy, ema, moments, trained.finite & (finite | ~some)), metrics

    return jax.jit(descend, donate_argnums=0, out_shardings=out_shardings)
