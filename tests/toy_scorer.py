"""A scorer as a person writes one: a class that implements `vpo_jax.rewards.protocol.Reward` and nothing else."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


class ToyScorer:
    """Brightness of a video's first and last frame, and the number of words of its prompt."""

    name = "toy"
    dimensions = ("brightness", "words")
    ranges = ((0.0, 1.0), (0.0, 10.0))
    trains = True
    jittable = True

    def __init__(self) -> None:
        self.params = {"scale": np.full((1,), 1 / 255, np.float32)}
        self.traced: list[tuple[int, int]] = []  # (videos, prompts) of every program that was made

    def frame_indices(self, num_frames: int) -> tuple[int, ...]:
        return (0, num_frames - 1)

    def prepare(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return {"words": np.array([len(prompt.split()) for prompt in prompts], np.float32)}

    def score(
        self, params: dict[str, jax.Array], videos: jax.Array | np.ndarray, prepared: dict[str, jax.Array]
    ) -> jax.Array:
        self.traced.append((len(videos), len(prepared["words"])))
        brightness = params["scale"] * jnp.asarray(videos, jnp.float32).mean((1, 2, 3, 4))
        words = jnp.repeat(prepared["words"], len(videos) // len(prepared["words"]))
        return jnp.stack([brightness, words], axis=1)


toy = ToyScorer()
