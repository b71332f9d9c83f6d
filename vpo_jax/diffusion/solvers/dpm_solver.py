"""DPM-Solver++."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vpo_jax.diffusion.multistep import Sampler, make_coefficients, make_levels
from vpo_jax.diffusion.process import clean_and_noise_weights
from vpo_jax.diffusion.timesteps import dpm_timesteps_and_sigmas
from vpo_jax.runtime.types import Table


def make_dpm_solver(fields: Mapping[str, Any], levels: Table, steps: int, first: int = 0) -> Sampler:
    """DPM-Solver++ of first or second order, multistep (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    `fields` are what `resolve` returns and `levels` abar, float32 [T]. No step reads one before `first`.
    """
    timesteps, sigmas = dpm_timesteps_and_sigmas(fields, levels, steps)
    steps = len(timesteps)
    # In float32 as in diffusers: lambda is near 10 at high noise, and its last bit shows in a difference of two.
    signal = 1 / np.sqrt(sigmas**2 + 1)
    noise = sigmas * signal
    now, following = slice(0, steps), slice(1, steps + 1)
    a, b, _, _ = clean_and_noise_weights(fields["prediction_type"], signal[now], noise[now])
    # The last step may end at sigma 0, lambda infinite: its terms are masked below.
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.diff(np.log(signal) - np.log(noise))  # the step in lambda = log(signal / noise)
        decay = np.exp(-h) - 1
        ratio = np.concatenate([np.ones(1, np.float32), h[:-1] / h[1:]])  # the step before over this one
        slope = -0.5 * decay if fields["solver_type"] == "midpoint" else decay / h + 1
        correction = signal[following] * slope / ratio
    correction = np.where(_second_order(fields, steps, first), correction, 0)
    coefficients = make_coefficients(
        steps,
        clean_of_sample=a,
        clean_of_prediction=b,
        next_of_sample=noise[following] / noise[now],
        next_of_clean=-signal[following] * decay + correction,
        next_of_previous_clean=(-correction,),
    )
    return Sampler(fields["_class_name"], timesteps, 1.0, coefficients, None, make_levels(signal[now], noise[now]))


def _second_order(fields: Mapping[str, Any], steps: int, first: int) -> npt.NDArray[np.bool_]:
    second = np.full(steps, fields["solver_order"] == 2)
    second[: first + 1] = False
    short = fields["lower_order_final"] and steps < 15
    if fields["euler_at_final"] or short or fields["final_sigmas_type"] == "zero":
        second[-1] = False
    return second
