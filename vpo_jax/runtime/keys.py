"""Random keys that depend on what they are for, never on where or in which order they are drawn."""

import jax

STREAMS = {"rollout": 0, "noise": 1, "dropout": 2, "eval": 3, "data": 4, "init": 5}


def stream_key(
    seed: int | jax.Array,
    stream: str,
    step: int | jax.Array = 0,
    slot: int | jax.Array = 0,
    index: int | jax.Array = 0,
) -> jax.Array:
    """Key of one draw: a `fold_in` chain over (seed, stream, step, slot, index).

    `slot` is the place of the prompt in the step and `index` the candidate or the update, so a mesh, a batch
    split or a restart changes nothing, and a prompt that stands twice in a step gets two different keys.
    `step`, `slot` and `index` may be traced.
    """
    key = jax.random.fold_in(jax.random.key(seed), STREAMS[stream])
    for part in (step, slot, index):
        key = jax.random.fold_in(key, part)
    return key
