"""Noise levels of variance-preserving diffusion, from the betas of a scheduler_config.json.

abar is the cumulative product of 1 - beta. The scale s_t of the signal is 1 but in the scaled schedule of
VideoCrafter2, which weakens the signal at high noise.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.types import FloatTable

_SCALE_STEPS = 400  # timesteps over which s_t falls from 1 to scale_b: mid_step of lvdm's LatentDiffusion


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
