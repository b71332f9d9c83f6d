"""Classifier-free guidance."""

from collections.abc import Callable
from typing import NamedTuple

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


def guide(unconditional: Array, conditional: Array, scale: float | Array, factor: float = 0.0) -> Array:
    """Classifier-free guidance by `scale`, rescaled by `factor` where it is above 0; arrays are [B, ...]."""
    guided = classifier_free(unconditional, conditional, scale)
    return rescale(guided, conditional, factor) if factor > 0.0 else guided


class Guidance(NamedTuple):
    """How far a video is led towards its prompt.

    Attributes:
      scale: of `classifier_free`; 1 or less is no guidance, as in diffusers, and saves half of the work.
      rescale: factor of `rescale`.
      boundary: the timestep below which another scale holds; None: one scale throughout.
      low_scale: that other scale.
    """

    scale: float
    rescale: float = 0.0
    boundary: float | None = None
    low_scale: float = 1.0

    def at(self, timestep: Array) -> float | Array:
        """The scale at a timestep."""
        if self.boundary is None or self.low_scale == self.scale:
            return self.scale
        return jnp.where(timestep >= self.boundary, self.scale, self.low_scale)


def guided(
    predict: Predict,
    text: Tree,
    negative: Tree,
    guidance: Guidance,
    read_text: Callable[[Tree], Tree] = lambda text: text,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`(latents [B, F, ...], timestep) -> prediction` of a denoiser under guidance; what a sampler takes.

    Args:
      predict: the denoiser; with guidance it meets both of a video's inputs in one batch of 2 B.
      text: tree of encodings [B, ...].
      negative: tree of what guidance leads away from, [B, ...] or one [...] for all; not read without guidance.
      guidance: its scales.
      read_text: encodings to what `predict` takes in their place, once for all steps.
    """
    if guidance.scale <= 1.0:
        read = read_text(text)
        return lambda latents, timestep: predict(latents, timestep, read)

    def side_by_side(without: jax.Array, given: jax.Array) -> jax.Array:
        # So that a device that holds a video holds both of its predictions.
        both = jnp.stack([jnp.broadcast_to(without, given.shape), given], axis=1)
        return constrain(both.reshape(-1, *given.shape[1:]), BATCH)

    both_texts = read_text(jax.tree.map(side_by_side, negative, text))

    def prediction(latents: jax.Array, timestep: jax.Array) -> jax.Array:
        twice = constrain(jnp.repeat(latents, 2, axis=0), VIDEO)
        both = predict(twice, timestep, both_texts).reshape(-1, 2, *latents.shape[1:])
        return guide(both[:, 0], both[:, 1], guidance.at(timestep), guidance.rescale)

    return prediction
