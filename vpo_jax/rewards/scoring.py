"""Scorers on batches of videos in training: their weights on the devices, all dimensions side by side."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vpo_jax.runtime.batches import in_microbatches
from vpo_jax.runtime.mesh import CLIPS, PARAMETER_RULES, batch_sharding, constrain, infer_shardings
from vpo_jax.runtime.processes import fetch, place, share, unshare

Tree = Any


def frames_to_decode(rewards: Sequence[Any], num_frames: int) -> tuple[int, ...]:
    """The union of the frames that the scorers read, in order."""
    return tuple(sorted({i for reward in rewards for i in reward.frame_indices(num_frames)}))


def score_function(reward, places, microbatch):
    def in_chunks(params, videos, prepared):
        n = len(videos)
        rows = jax.tree.leaves(prepared)[0].shape[0]
        prepared = jax.tree.map(lambda x: jnp.repeat(x, n // rows, axis=0), prepared)
        spread = lambda tree: jax.tree.map(lambda x: constrain(x, CLIPS), tree)
        return in_microbatches(lambda chunk: reward.score(params, spread(chunk)[0][:, np.array(places)], spread(chunk)[1]), (videos, prepared), microbatch)
    return jax.jit(in_chunks)


class Weights:
    """Scorers' parameters on the mesh that they are computed on: cut over it by the rules, once for all who score.

    With `offload` they lie in host memory between calls, and every call copies them to the devices.
    """

    def __init__(self, mesh: Mesh, offload: bool = False) -> None:
        self.mesh, self._offload = mesh, offload
        self._placed: dict[int, Tree] = {}

    def __call__(self, reward: Any) -> Tree:
        """The parameters of one scorer, as its `score` takes them."""
        if not reward.jittable:
            return reward.params
        placed = self._placed.get(id(reward))
        if placed is None:
            placed = place(reward.params, infer_shardings(reward.params, self.mesh, PARAMETER_RULES))
            if not self._offload:
                self._placed[id(reward)] = placed
        return placed


class Scores:
    """All scorers on one batch of videos; built once, called for every batch.

    A scorer that is not jittable gets numpy arrays on the host, and the device waits for it.
    """

    def __init__(
        self, rewards: Sequence[Any], weights: Weights, num_frames: int, frames: Sequence[int], microbatch: int = 0
    ) -> None:
        self.rewards, self._weights = tuple(rewards), weights
        places = {frame: place for place, frame in enumerate(frames)}
        self._score = [
            self._one(reward, tuple(places[i] for i in reward.frame_indices(num_frames)), microbatch)
            for reward in self.rewards
        ]

    @staticmethod
    def _one(reward: Any, places: tuple[int, ...], microbatch: int) -> Callable:
        def score(params: Tree, videos: Any, prepared: Tree) -> Any:
            return reward.score(params, videos[:, np.array(places)], prepared)

        if not reward.jittable:
            return lambda params, videos, prepared: jnp.asarray(_on_hosts(partial(score, params), videos, prepared))

        def in_chunks(params: Tree, videos: jax.Array, prepared: Tree) -> jax.Array:
            # Clips are scored by themselves: every device but the tensor axis's takes its share of them.
            spread = lambda tree: jax.tree.map(lambda x: constrain(x, CLIPS), tree)  # noqa: E731
            return in_microbatches(lambda chunk: score(params, *spread(chunk)), (videos, prepared), microbatch)

        return jax.jit(in_chunks)

    def __call__(self, videos: jax.Array, prompts: Sequence[str]) -> jax.Array:
        """float32 [B, D], the scorers' dimensions side by side.

        Args:
          videos: uint8 [B, f, H, W, 3], the frames given at construction.
          prompts: B of them.
        """
        prompts = [p for p in prompts for _ in range(len(videos) // len(prompts))]
        with jax.set_mesh(self._weights.mesh):
            videos = bring(videos, self._weights.mesh)
            columns = [
                score(self._weights(reward), videos, reward.prepare(prompts))
                for reward, score in zip(self.rewards, self._score, strict=True)
            ]
            return jnp.concatenate([jnp.asarray(column, jnp.float32) for column in columns], axis=-1)


def bring(batch: jax.Array, mesh: Mesh) -> jax.Array:
    """A batch on `mesh`: as it is if it is there, else copied and cut along its first axis."""
    if getattr(batch.sharding, "mesh", None) == mesh:
        return batch
    return jax.device_put(batch, batch_sharding(mesh))


def _on_hosts(score: Callable[[np.ndarray, Tree], Any], videos: jax.Array, prepared: Tree) -> np.ndarray:
    """Each process scores its share of the videos, once; all get the scores of all."""
    whole = fetch(videos)
    scores = np.asarray(score(share(whole), jax.tree.map(lambda x: share(np.asarray(x)), prepared)), np.float32)
    return unshare(scores, len(whole))
