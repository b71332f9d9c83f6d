"""The loop that the embedded world's recipes share: update, log, checkpoint, resume."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax

from vpo_jax.checkpoints.orbax_store import CheckpointStore

State = TypeVar("State")  # a pytree of arrays


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
