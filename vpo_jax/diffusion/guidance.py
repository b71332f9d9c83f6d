"""Classifier-free guidance."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vpo_jax.runtime.mesh import BATCH, VIDEO, constrain
from vpo_jax.runtime.types import Array, Tree

# (latents [B, ...], timestep, text: a tree of [B, ...]) -> prediction, like the latents.
Predict = Callable[[Array, Array, Tree], Array]


def classifier_free(unconditional: Array, conditional: Array, scale: float | Array) -> Array:
    """unconditional + scale (conditional - unconditional) (Ho and Salimans 2022); scale 1 is no guidance."""
    return unconditional + scale * (conditional - unconditional)


def rescale(guided: Array, conditional: Array, factor: float | Array) -> Array:
    """Guided prediction [B, ...] pulled back to the conditional one's standard deviation by `factor` in [0, 1].

    Lin et al. 2023 (arXiv 2305.08891), section 3.4: large guidance overexposes, more so at zero terminal SNR.
    """
    axes = tuple(range(1, guided.ndim))
    matched = guided * (
        jnp.std(conditional, axes, ddof=1, keepdims=True) / jnp.std(guided, axes, ddof=1, keepdims=True)
    )
    return factor * matched + (1 - factor) * guided


def guide(unconditional: Array, conditional: Array, scale: float, factor: float = 0.0) -> Array:
    """Classifier-free guidance by `scale`, rescaled by `factor` where it is above 0; arrays are [B, ...]."""
    guided = classifier_free(unconditional, conditional, scale)
    return rescale(guided, conditional, factor) if factor > 0.0 else guided


def guided(
    predict: Predict, text: Tree, negative: Tree, scale: float, factor: float = 0.0
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`(latents [B, F, ...], timestep) -> prediction` of a denoiser under guidance; what a sampler takes.

    Args:
      predict: the denoiser; with guidance it meets both of a video's inputs in one batch of 2 B.
      text: tree of encodings [B, ...].
      negative: tree of what guidance leads away from, [B, ...] or one [...] for all; not read without guidance.
      scale: of `classifier_free`; 1 or less is no guidance, as in diffusers, and saves half of the work.
      factor: of `rescale`.
    """
    if scale <= 1.0:
        return lambda latents, timestep: predict(latents, timestep, text)

    def side_by_side(without: jax.Array, given: jax.Array) -> jax.Array:
        # So that a device that holds a video holds both of its predictions.
        both = jnp.stack([jnp.broadcast_to(without, given.shape), given], axis=1)
        return constrain(both.reshape(-1, *given.shape[1:]), BATCH)

    both_texts = jax.tree.map(side_by_side, negative, text)

    def prediction(latents: jax.Array, timestep: jax.Array) -> jax.Array:
        twice = constrain(jnp.repeat(latents, 2, axis=0), VIDEO)
        both = predict(twice, timestep, both_texts).reshape(-1, 2, *latents.shape[1:])
        return guide(both[:, 0], both[:, 1], scale, factor)

    return prediction
