"""Candidate videos from the policy as it is now: sampled and decoded, each compiled once.

Both take clips, [B, ...] with B = prompts x candidates, in microbatches. A clip's noise comes from its own key,
so the same clip comes out of any batch, split or mesh.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vpo_jax.diffusion.guidance import guide
from vpo_jax.diffusion.samplers import Sampler, sample
from vpo_jax.runtime.batches import in_microbatches
from vpo_jax.runtime.keys import stream_key
from vpo_jax.runtime.mesh import BATCH, VIDEO, constrain
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
) -> Callable[[Tree, Tree, jax.Array, jax.Array, jax.Array], jax.Array]:
    """`rollout(frozen, adapters, text [B, L, D], negative [L, D], keys [B]) -> clean latents [B, F, h, w, C]`, jitted.

    A guidance scale of 1 or less is no guidance, as in diffusers, and saves half of the work.
    """

    def of_chunk(frozen: Tree, adapters: Tree, negative: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        text, keys = chunk
        split = jax.vmap(jax.random.split)(keys)  # [B, 2]
        noise = jax.vmap(lambda key: jax.random.normal(key, latent_shape, jnp.float32))(split[:, 0])
        noise = constrain(noise, VIDEO)
        if guidance_scale <= 1.0:
            guided = lambda latents, timestep: denoise(  # noqa: E731
                frozen, adapters, latents, jnp.full(latents.shape[0], timestep), text
            )
        else:
            both_text = jnp.stack([jnp.broadcast_to(negative, text.shape), text], axis=1)
            both_text = constrain(both_text.reshape(-1, *text.shape[1:]), BATCH)

            def guided(latents: jax.Array, timestep: jax.Array) -> jax.Array:
                twice = constrain(jnp.repeat(latents, 2, axis=0), VIDEO)
                both = denoise(frozen, adapters, twice, jnp.full(twice.shape[0], timestep), both_text)
                both = both.reshape(-1, 2, *latents.shape[1:])
                return guide(both[:, 0], both[:, 1], guidance_scale, guidance_rescale)

        return constrain(sample(sampler, guided, noise, split[:, 1]), VIDEO)

    def rollout(frozen: Tree, adapters: Tree, text: jax.Array, negative: jax.Array, keys: jax.Array) -> jax.Array:
        return in_microbatches(lambda chunk: of_chunk(frozen, adapters, negative, chunk), (text, keys), microbatch)

    return jax.jit(rollout)


def make_decode(pipeline: Any, frames: Sequence[int], microbatch: int = 0) -> Callable[[Tree, jax.Array], jax.Array]:
    """`decode(vae_params, latents [B, F, h, w, C]) -> uint8 [B, len(frames), H, W, 3]`, jitted: only these frames."""
    indices = tuple(frames)

    def of_chunk(params: Tree, latents: jax.Array) -> jax.Array:
        return constrain(pipeline.to_uint8(pipeline.decode(params, latents, indices)), BATCH)

    return jax.jit(lambda params, latents: in_microbatches(lambda x: of_chunk(params, x), latents, microbatch))
