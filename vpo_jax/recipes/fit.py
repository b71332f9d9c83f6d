"""What the embedded world's recipes share: one update, and the loop that updates, logs, checkpoints and resumes."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from vpo_jax.checkpoints.orbax_store import CheckpointStore
from vpo_jax.runtime.trees import path_of

State = TypeVar("State")  # a pytree of arrays
Tree = Any
Metrics = dict[str, jax.Array]
Loss = Callable[..., tuple[jax.Array, Metrics]]  # (parameters, step, *data) -> (loss, metrics)


class Fitted(NamedTuple):
    """State of a stage: parameters, their moving average, the optimizer."""

    params: Tree
    ema: Tree
    optimizer: Tree


Update = Callable[..., tuple[Fitted, Metrics]]  # (state, step, *data) -> (state, metrics)


def make_schedule(peak: float, steps: int, decay_from: float) -> optax.Schedule:
    """Warm-up over 1 % of the steps, constant, then linear to zero from `decay_from` of them on."""
    warm, hold = max(1, steps // 100), int(steps * decay_from)
    parts = [
        optax.linear_schedule(0.0, peak, warm),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, 0.0, steps - hold),
    ]
    return optax.join_schedules(parts, [warm, hold])


def make_muon(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon on kernels, whose last axis is the output; Adam at a tenth of the rate on the rest (Jordan et al., 2024).

    The places of a convolution's window and its input channels are one side of the matrix; a stack of layers
    ("blocks.*") is a matrix a layer.
    """

    def sides(params: Tree) -> Tree:
        def of(keys: jax.tree_util.KeyPath, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
            path = path_of(keys)
            if not path.endswith("/kernel") or min(leaf.shape[-2:]) == 1:
                return None
            return optax.contrib.MuonDimensionNumbers(tuple(range(int("*" in path), leaf.ndim - 1)), leaf.ndim - 1)

        return jax.tree_util.tree_map_with_path(of, params)

    muon = optax.contrib.muon(
        schedule,
        adam_b2=0.99,
        weight_decay=1e-4,
        adam_learning_rate=lambda step: 0.1 * schedule(step),
        muon_weight_dimension_numbers=sides,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def make_update(loss: Loss, optimizer: optax.GradientTransformation, decay: float) -> Update:
    """Jitted (state, step, *data) -> (state, metrics) for `loss(params, step, *data)`."""

    @partial(jax.jit, donate_argnums=0)
    def update(state: Fitted, step: jax.Array, *data: jax.Array) -> tuple[Fitted, Metrics]:
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, step, *data)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
        ema = jax.tree.map(lambda average, new: keep * average + (1 - keep) * new, state.ema, params)
        return Fitted(params, ema, moments), metrics

    return update


def fit(
    state: State,
    update: Callable[[State, int], tuple[State, dict[str, jax.Array]]],
    steps: int,
    checkpoints: Path,
    every: int = 200,
    seconds: float | None = None,
) -> State:
    """Runs `update(state, step)` from the newest checkpoint (or the start) up to `steps`.

    Args:
      state: pytree of arrays; taken as it is where there is no checkpoint.
      update: one step; everything random in it follows from `step`, so a resumed run is the same run.
      steps: where the recipe ends.
      checkpoints: directory of this stage's checkpoints.
      every: steps between checkpoints and lines of output.
      seconds: stop (saved) after this long; the same command goes on from there.

    Raises:
      TimeoutError: `seconds` ran out before `steps`.
    """
    store = CheckpointStore(checkpoints, keep=1)
    start = 0
    if store.latest() is not None:
        local = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=local), state)
        start, state, _ = store.restore(None, target)
        print(f"{checkpoints.name}: going on from step {start}", flush=True)
    began = time.monotonic()
    total: dict[str, jax.Array | float] = {}
    for step in range(start, steps):
        state, metrics = update(state, step)
        total = {name: total.get(name, 0.0) + value for name, value in metrics.items()}
        done = step + 1
        out_of_time = seconds is not None and time.monotonic() - began > seconds
        if done % every == 0 or done == steps or out_of_time:
            count = (done - start) % every or min(every, done - start)
            values = ", ".join(f"{name} {float(value) / count:.4f}" for name, value in total.items())
            pace = (time.monotonic() - began) / (done - start)
            print(f"{checkpoints.name} {done}/{steps}: {values}; {pace:.2f} s a step", flush=True)
            total = {}
            store.save(done, state, {})
            if out_of_time and done < steps:
                store.close()
                raise TimeoutError(f"stopped after {seconds:.0f} s at step {done}; the same command goes on")
    store.close()
    return state
