"""Euler's method, on variance-preserving processes and on flows."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vpo_jax.diffusion.multistep import Sampler, make_coefficients, make_levels
from vpo_jax.diffusion.process import clean_and_noise_weights
from vpo_jax.diffusion.timesteps import euler_timesteps_and_sigmas, flow_euler_timesteps_and_sigmas
from vpo_jax.runtime.types import Table


def make_euler(fields: Mapping[str, Any], levels: Table, steps: int) -> Sampler:
    """Euler's method on the probability flow ODE in sigma (Karras et al. 2022, arXiv 2206.00364, algorithm 2).

    `fields` are what `resolve` returns and `levels` abar, float32 [T].
    """
    timesteps, sigmas32 = euler_timesteps_and_sigmas(fields, levels, steps)
    steps = len(timesteps)
    sigmas = sigmas32.astype(np.float64)
    scale = 1 / np.sqrt(sigmas[:steps] ** 2 + 1)
    # Samples are kept as x_0 + sigma eps here: the variance-preserving rule with its sample scaled.
    a, b, _, _ = clean_and_noise_weights(fields["prediction_type"], scale, sigmas[:steps] * scale)
    remaining = sigmas[1:] / sigmas[:steps]
    coefficients = make_coefficients(
        steps,
        input_scale=scale,
        clean_of_sample=a * scale,
        clean_of_prediction=b,
        next_of_sample=remaining,
        next_of_clean=1 - remaining,
    )
    largest = float(sigmas.max())
    initial = (largest**2 + 1) ** 0.5 if fields["timestep_spacing"] == "leading" else largest
    levels_of_samples = make_levels(np.ones(steps), sigmas[:steps])
    return Sampler(fields["_class_name"], timesteps, initial, coefficients, None, levels_of_samples)


def make_flow_euler(fields: Mapping[str, Any], steps: int) -> Sampler:
    """Euler's method on dx/dsigma = velocity, from sigma 1 to 0 (Esser et al. 2024, arXiv 2403.03206).

    `fields` are what `resolve` returns.
    """
    timesteps, sigmas32 = flow_euler_timesteps_and_sigmas(fields, steps)
    sigmas = sigmas32.astype(np.float64)
    now, remaining = sigmas[:-1], sigmas[1:] / sigmas[:-1]
    a, b, _, _ = clean_and_noise_weights("flow_prediction", 1 - now, now)
    coefficients = make_coefficients(
        steps,
        clean_of_sample=a,
        clean_of_prediction=b,
        next_of_sample=remaining,
        next_of_clean=1 - remaining,
    )
    return Sampler(fields["_class_name"], timesteps, 1.0, coefficients, None, make_levels(1 - now, now))
