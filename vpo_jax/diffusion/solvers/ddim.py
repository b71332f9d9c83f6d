"""DDIM."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vpo_jax.diffusion.multistep import Sampler, make_coefficients, make_levels
from vpo_jax.diffusion.process import clean_and_noise_weights
from vpo_jax.diffusion.schedules import signal_scale
from vpo_jax.diffusion.timesteps import ddim_timesteps
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.types import Table


def make_ddim(fields: Mapping[str, Any], levels: Table, steps: int, eta: float) -> Sampler:
    """Song et al. 2020 (arXiv 2010.02502), equations 12 and 16; VideoCrafter2's scale multiplies the signal.

    `fields` are what `resolve` returns, `levels` abar, float32 [T], and `eta` in [0, 1] the share of fresh noise.
    """
    timesteps = ddim_timesteps(fields, steps)
    # Always this stride back, whatever the spacing; diffusers does so, and samples depend on it.
    before = timesteps - fields["num_train_timesteps"] // steps
    final = 1.0 if fields["set_alpha_to_one"] else levels[0]
    now = levels[timesteps].astype(np.float64)
    previous = np.where(before >= 0, levels[np.maximum(before, 0)], final).astype(np.float64)
    if fields["prediction_type"] == "epsilon" and (now == 0).any():
        raise UserError(
            "scheduler_config.json: rescale_betas_zero_snr: these steps visit zero terminal SNR, where an epsilon "
            "prediction says nothing of the clean sample; use prediction_type 'v_prediction' or timestep_spacing "
            "'leading'"
        )
    scale = signal_scale(fields).astype(np.float64)
    scale_now, scale_before = scale[timesteps], scale[np.maximum(before, 0)]
    signal, noise = np.sqrt(now) * scale_now, np.sqrt(1 - now)
    a, b, c, d = clean_and_noise_weights(fields["prediction_type"], signal, noise)
    fresh = eta * np.sqrt(np.maximum((1 - previous) / (1 - now) * (1 - now / previous), 0.0))
    coefficients = make_coefficients(
        steps,
        clean_of_sample=a,
        clean_of_prediction=b,
        noise_of_sample=c,
        noise_of_prediction=d,
        next_of_clean=np.sqrt(previous) * scale_before,
        next_of_noise=np.sqrt(np.maximum(1 - previous - fresh**2, 0.0)),
        fresh_noise=fresh,
    )
    clip_range = float(fields["clip_sample_range"]) if fields["clip_sample"] else None
    return Sampler(fields["_class_name"], timesteps, 1.0, coefficients, clip_range, make_levels(signal, noise))
