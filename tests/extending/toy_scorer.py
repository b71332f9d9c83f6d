"""A scorer in full: likes contrast, reads four frames of a video, and never looks at the prompt."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.rewards.protocol import even_indices


@dataclasses.dataclass(frozen=True)
class Contrast:
    """Standard deviation of a video's pixels, in [0, 0.5]; see `vpo_jax.rewards.protocol.Reward`."""

    name: str = "contrast"
    dimensions: tuple[str, ...] = ("contrast",)
    ranges: tuple[tuple[float, float], ...] = ((0.0, 0.5),)
    trains: bool = True
    jittable: bool = True
    params: Any = dataclasses.field(default_factory=dict)

    def frame_indices(self, num_frames: int) -> tuple[int, ...]:
        """Four frames; the autoencoder decodes no others for it."""
        return even_indices(num_frames, 4)

    def prepare(self, prompts: Sequence[str]) -> np.ndarray:
        """A row of nothing for each prompt."""
        return np.zeros((len(prompts), 0), np.float32)

    def score(self, params: Any, videos: jax.Array, prepared: Any) -> jax.Array:
        """float32 [B, 1] of videos uint8 [B, f, H, W, 3]."""
        del params, prepared
        pixels = jnp.asarray(videos, jnp.float32) / 255.0
        return jnp.std(pixels, axis=(1, 2, 3, 4))[:, None]


contrast = Contrast()


def brightness(videos: np.ndarray, prompts: list[str]) -> dict[str, np.ndarray]:
    """A scorer as a plain function: uint8 [B, F, H, W, 3] and B prompts, one number a video."""
    return {"brightness": videos.mean((1, 2, 3, 4))}


brightness.dimensions = ("brightness",)
brightness.ranges = ((0.0, 255.0),)
