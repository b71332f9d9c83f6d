"""Sampling that keeps every step with its log-probability, for algorithms that learn from the path and not its end."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.diffusion.multistep import Denoise, Sampler, SamplerState
from vpo_jax.runtime.errors import UserError


class Trajectory(NamedTuple):
    """S denoising steps of B videos. Step i goes from `latents[:, i]` to `latents[:, i + 1]`.

    Attributes:
      latents: float32 [B, S + 1, F, h, w, C], from noise to clean.
      log_probabilities: float32 [B, S], mean over a video's elements; 0 where a step draws no noise.
    """

    latents: jax.Array
    log_probabilities: jax.Array


def check_stochastic(sampler: Sampler) -> None:
    """Raises UserError where steps have no probability density, or depend on more than the last sample."""
    if not sampler.is_stochastic or sampler.history or sampler.coefficients.corrector is not None:
        raise UserError(
            f"rollout.eta: log-probabilities need a sampler that draws fresh noise, and {sampler.name} does not with"
            " this eta; set rollout.sampler=DDIMScheduler and rollout.eta=1.0"
        )


def sample_trajectory(sampler: Sampler, denoise: Denoise, latents: jax.Array, key: jax.Array) -> Trajectory:
    """As `diffusion.samplers.sample`, with the same bits at the end, and every step on the way.

    Args:
      sampler: a stochastic one (see `check_stochastic`).
      denoise: (model input [B, ...], timestep scalar) -> prediction [B, ...].
      latents: unit Gaussian [B, ...].
      key: one key, or one a video [B].
    """

    def body(state: SamplerState, at: tuple[jax.Array, jax.Array]) -> tuple[SamplerState, tuple[jax.Array, jax.Array]]:
        i, timestep = at
        prediction = denoise(sampler.model_input(state, i), timestep)
        following = sampler.step(state, i, prediction, key)
        return following, (following.sample, log_probability(sampler, i, state.sample, prediction, following.sample))

    state = sampler.init(latents)
    steps = (jnp.arange(len(sampler.timesteps)), jnp.asarray(sampler.timesteps))
    _, (samples, log_probabilities) = jax.lax.scan(body, state, steps)
    path = jnp.concatenate([state.sample[None], samples])
    return Trajectory(jnp.swapaxes(path, 0, 1), jnp.swapaxes(log_probabilities, 0, 1))


def log_probability(
    sampler: Sampler, i: int | jax.Array, before: jax.Array, prediction: jax.Array, after: jax.Array
) -> jax.Array:
    """Mean over a video's elements of log N(after; mean, s^2), float32 [B]; 0 where step i draws no noise (s = 0).

    The mean is what the sampler makes of `before` [B, ...] and the denoiser's prediction [B, ...] without fresh noise.
    """
    mean = sampler.advance(SamplerState(before), i, prediction, None).sample
    deviation = jnp.asarray(np.asarray(sampler.coefficients.fresh_noise))[i]
    safe = jnp.where(deviation > 0.0, deviation, 1.0)
    density = -0.5 * jnp.square((after - mean) / safe) - jnp.log(safe) - 0.5 * math.log(2 * math.pi)
    return jnp.where(deviation > 0.0, jnp.mean(density, axis=tuple(range(1, after.ndim))), 0.0)
