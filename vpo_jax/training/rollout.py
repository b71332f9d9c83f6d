"""Candidate videos from the policy as it is now: encode, sample, decode and score, each compiled once.

All four take clips, [B, ...] with B = prompts x candidates, in microbatches. A clip's noise comes from its own key,
so the same clip comes out of any batch, split or mesh.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vpo_jax.diffusion.guidance import guided
from vpo_jax.diffusion.samplers import Sampler, sample
from vpo_jax.families.protocol import Text
from vpo_jax.runtime.batches import in_microbatches
from vpo_jax.runtime.keys import stream_key
from vpo_jax.runtime.mesh import BATCH, CLIPS, PARAMETER_RULES, VIDEO, batch_sharding, constrain, infer_shardings
from vpo_jax.runtime.processes import fetch, place, share, unshare
from vpo_jax.training.step import Denoise

Tree = Any


def make_candidate_keys(seed: int, prompts: int, candidates: int) -> Callable[[Any], jax.Array]:
    """`keys(step)`: keys [prompts * candidates] of a step's clips, the candidates of a prompt side by side."""

    def keys(step: jax.Array) -> jax.Array:
        slots = jnp.repeat(jnp.arange(prompts), candidates)
        indices = jnp.tile(jnp.arange(candidates), prompts)
        return jax.vmap(lambda slot, index: stream_key(seed, "rollout", step, slot, index))(slots, indices)

    return jax.jit(keys)


def make_rollout(
    denoise: Denoise,
    sampler: Sampler,
    latent_shape: tuple[int, ...],
    guidance_scale: float,
    microbatch: int = 0,
    guidance_rescale: float = 0.0,
) -> Callable[[Tree, Tree, Text, Text, jax.Array], jax.Array]:
    """`rollout(frozen, adapters, text of B, negative of one, keys [B]) -> clean latents [B, f, h, w, C]`, jitted.

    A guidance scale of 1 or less is no guidance, as in diffusers, and saves half of the work.
    """

    def of_chunk(frozen: Tree, adapters: Tree, negative: Text, chunk: tuple[Text, jax.Array]) -> jax.Array:
        text, keys = chunk
        split = jax.vmap(jax.random.split)(keys)  # [B, 2]
        noise = jax.vmap(lambda key: jax.random.normal(key, latent_shape, jnp.float32))(split[:, 0])
        noise = constrain(noise, VIDEO)

        def predict(latents: jax.Array, timestep: jax.Array, text: Text) -> jax.Array:
            return denoise(frozen, adapters, latents, jnp.full(latents.shape[0], timestep), text)

        predict_guided = guided(predict, text, negative, guidance_scale, guidance_rescale)
        return constrain(sample(sampler, predict_guided, noise, split[:, 1]), VIDEO)

    def rollout(frozen: Tree, adapters: Tree, text: Text, negative: Text, keys: jax.Array) -> jax.Array:
        return in_microbatches(lambda chunk: of_chunk(frozen, adapters, negative, chunk), (text, keys), microbatch)

    return jax.jit(rollout)


def make_decode(pipeline: Any, frames: Sequence[int], microbatch: int = 0) -> Callable[[Tree, jax.Array], jax.Array]:
    """`decode(vae_params, latents [B, F, h, w, C]) -> uint8 [B, len(frames), H, W, 3]`, jitted: only these frames."""
    indices = tuple(frames)

    def of_chunk(params: Tree, latents: jax.Array) -> jax.Array:
        return constrain(pipeline.to_uint8(pipeline.family.decode(params, latents, indices)), BATCH)

    return jax.jit(lambda params, latents: in_microbatches(lambda x: of_chunk(params, x), latents, microbatch))


def frames_to_decode(rewards: Sequence[Any], num_frames: int) -> tuple[int, ...]:
    """The union of the frames that the scorers read, in order."""
    return tuple(sorted({i for reward in rewards for i in reward.frame_indices(num_frames)}))


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
