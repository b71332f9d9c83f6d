"""Videos of the training captions, rendered and encoded once for many updates of a denoiser."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vpo_jax.shapes import world

Render = Callable[[jax.Array, jax.Array], world.Videos]  # (key, rows of captions) -> videos
_CHUNK = 256  # videos rendered at a time


def encode_pool(
    key: jax.Array, number: int, size: int, encode: Callable[[jax.Array], tuple[jax.Array, ...]], render: Render
) -> tuple[jax.Array, ...]:
    """Pool `number`, `size` videos: what `encode` makes of frames [B, F, H, W, 3], then the captions' rows [size]."""
    rows = jnp.asarray(world.caption_indices("train"))
    parts = []
    for chunk in range(size // _CHUNK):
        render_key, row_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, number), chunk))
        chosen = jax.random.randint(row_key, (_CHUNK,), 0, len(rows))
        parts.append((*encode(render(render_key, rows[chosen]).frames), chosen))
    return tuple(jnp.concatenate(part) for part in zip(*parts, strict=True))
