"""Random keys that depend on what they are for, never on where or in which order they are drawn."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.runtime.errors import UserError

STREAMS = {"rollout": 0, "noise": 1, "dropout": 2, "eval": 3, "data": 4, "init": 5, "trunk": 6}
SEED_BITS = 64


def check_seed(seed: Any, field: str) -> int:
    """The seed as an int; raises UserError, naming `field`, for what is not a whole number of 64 bits."""
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < 2**SEED_BITS:
        raise UserError(f"{field}: {seed!r} is not a whole number from 0 to 2**{SEED_BITS} - 1; choose one")
    return int(seed)


def seed_key(seed: int, field: str = "seed") -> jax.Array:
    """`jax.random.key(seed)` of all 64 bits of a seed.

    With 32-bit integers, JAX's default, `jax.random.key` drops the upper half: 2**32 + 5 gives the key of 5. Here a
    seed below 2**32 gives JAX's own key, and a larger one what JAX gives with 64-bit integers: [upper, lower].

    Raises:
      UserError: naming `field`: not a whole number of 64 bits.
    """
    seed = check_seed(seed, field)
    if seed < 2**32:
        return jax.random.key(seed)
    halves = np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    words = jax.random.key_data(jax.random.key(0)).shape[0]  # 2, or 4 with another generator as the default
    return jax.random.wrap_key_data(jnp.asarray(np.tile(halves, words // 2)))


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
    `step`, `slot` and `index` may be traced, and so may a `seed` of 32 bits.
    """
    key = jax.random.fold_in(jax.random.key(seed) if isinstance(seed, jax.Array) else seed_key(seed), STREAMS[stream])
    for part in (step, slot, index):
        key = jax.random.fold_in(key, part)
    return key
