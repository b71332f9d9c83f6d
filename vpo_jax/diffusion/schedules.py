"""Noise schedules of variance-preserving diffusion: how a clean latent, noise and a timestep become a noisy latent.

x_t = sqrt(abar_t) s_t x_0 + sqrt(1 - abar_t) eps, with abar the cumulative product of 1 - beta. s_t is 1 but in the
scaled schedule of VideoCrafter2, which weakens the signal at high noise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from vpo_jax.diffusion.config import resolve
from vpo_jax.runtime.errors import UserError

FloatTable = npt.NDArray[np.float32]

_SCALE_STEPS = 400  # timesteps over which s_t falls from 1 to scale_b: mid_step of lvdm's LatentDiffusion


@dataclass(frozen=True, eq=False)
class Schedule:
    """What training needs to know of a scheduler_config.json.

    `alphas_cumprod` is float32 [T]; `prediction_type` says what the denoiser is trained to predict: "epsilon",
    "v_prediction" or "sample". `signal_scale` is s_t, float32 [T].
    """

    alphas_cumprod: FloatTable
    prediction_type: str
    num_train_timesteps: int
    signal_scale: FloatTable

    @property
    def signal(self) -> FloatTable:
        """sqrt(abar_t) s_t, float32 [T]."""
        return np.sqrt(self.alphas_cumprod) * self.signal_scale

    @property
    def noise(self) -> FloatTable:
        """sqrt(1 - abar_t), float32 [T]."""
        return np.sqrt(1.0 - self.alphas_cumprod)


def make_schedule(config: Mapping[str, Any], name: str | None = None) -> Schedule:
    """The schedule of a scheduler_config.json, read as its own class or as the class `name` reads it.

    Raises UserError for values that are not honoured, by the field's name.
    """
    fields = resolve(config, name)
    steps = fields["num_train_timesteps"]
    return Schedule(alphas_cumprod(fields), fields["prediction_type"], steps, signal_scale(fields))


def add_noise(schedule: Schedule, clean: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    """x_t from x_0 [B, ...], eps [B, ...] and integer timesteps [B]."""
    signal, sigma = _levels(schedule, timesteps, clean.ndim)
    return signal * clean + sigma * noise


def training_target(schedule: Schedule, clean: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
    """What the denoiser should predict at x_t: eps, x_0, or v = sqrt(abar) eps - sqrt(1 - abar) x_0 [B, ...]."""
    if schedule.prediction_type == "epsilon":
        return noise
    if schedule.prediction_type == "sample":
        return clean
    signal, sigma = _levels(schedule, timesteps, clean.ndim)
    return signal * noise - sigma * clean


def to_clean_and_noise(
    schedule: Schedule, prediction: jax.Array, noisy: jax.Array, timesteps: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(x_0, eps) that a prediction at x_t stands for, each [B, ...].

    Not finite where the schedule makes the question meaningless: x_0 of an epsilon prediction at zero terminal SNR.
    """
    signal, sigma = _levels(schedule, timesteps, noisy.ndim)
    if schedule.prediction_type == "epsilon":
        return (noisy - sigma * prediction) / signal, prediction
    if schedule.prediction_type == "sample":
        return prediction, (noisy - signal * prediction) / sigma
    return signal * noisy - sigma * prediction, signal * prediction + sigma * noisy


def alphas_cumprod(fields: Mapping[str, Any]) -> FloatTable:
    """abar_t as diffusers' class computes it, float32 [T], from the fields that `resolve` returns.

    Betas are rounded to float32 before the product, as torch does: a cosine schedule ends at 1 - beta = 0.001, where
    that rounding moves abar by 3e-5 of its value.
    """
    betas = _betas(fields)
    if fields["rescale_betas_zero_snr"]:
        betas = _rescale_to_zero_terminal_snr(betas)
    alphas = _cumulative_product(np.float32(1.0) - betas)
    if fields["rescale_betas_zero_snr"] and fields["_class_name"] != "DDIMScheduler":
        # The samplers that divide by sqrt(abar) keep float16's smallest number instead of 0.
        alphas[-1] = 2.0**-24
    return alphas


def signal_scale(fields: Mapping[str, Any]) -> FloatTable:
    """s_t, float32 [T]: ones, or with `use_scale` VideoCrafter2's line from 1 to `scale_b`, constant afterwards."""
    scale = np.ones(fields["num_train_timesteps"], np.float32)
    if fields["use_scale"]:
        fall = np.linspace(1.0, fields["scale_b"], _SCALE_STEPS)[: len(scale)]
        scale[:] = fields["scale_b"]
        scale[: len(fall)] = fall
    return scale


def _betas(fields: Mapping[str, Any]) -> FloatTable:
    count, start, end = fields["num_train_timesteps"], fields["beta_start"], fields["beta_end"]
    if fields["trained_betas"] is not None:
        betas = np.asarray(fields["trained_betas"], np.float32)
    elif fields["beta_schedule"] == "linear":
        betas = np.linspace(start, end, count).astype(np.float32)
    elif fields["beta_schedule"] == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, count).astype(np.float32) ** 2
    else:
        betas = _cosine_betas(count)
    if not (np.isfinite(betas).all() and (betas >= 0).all() and (betas <= 1).all()):
        raise UserError("scheduler_config.json: beta_start, beta_end, trained_betas: betas must lie between 0 and 1")
    return betas


def _cosine_betas(count: int, largest: float = 0.999) -> FloatTable:
    """Betas of abar(u) = cos^2(pi/2 (u + 0.008) / 1.008) (Nichol and Dhariwal 2021, equation 17), capped."""
    level = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    return np.asarray([min(1 - level[i + 1] / level[i], largest) for i in range(count)], np.float32)


def _rescale_to_zero_terminal_snr(betas: FloatTable) -> FloatTable:
    """Betas whose last abar is 0 and whose first is kept (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    signal = np.sqrt(_cumulative_product(np.float32(1.0) - betas))
    first, last = signal[0], signal[-1]
    signal = (signal - last) * (first / (first - last))
    level = signal**2
    return np.float32(1.0) - np.concatenate([level[:1], level[1:] / level[:-1]])


def _cumulative_product(values: FloatTable) -> FloatTable:
    # torch accumulates in double precision and rounds every entry.
    return np.cumprod(values.astype(np.float64)).astype(np.float32)


def _levels(schedule: Schedule, timesteps: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
    shape = (-1,) + (1,) * (ndim - 1)
    signal = jnp.asarray(schedule.signal)[timesteps].reshape(shape)
    sigma = jnp.asarray(schedule.noise)[timesteps].reshape(shape)
    return signal, sigma
