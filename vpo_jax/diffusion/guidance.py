"""Classifier-free guidance."""

import jax.numpy as jnp

from vpo_jax.runtime.types import Array


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
