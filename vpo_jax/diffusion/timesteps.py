"""Which timesteps and noise levels a sampler visits: host tables, computed once.

The three classes differ in small ways that change every video, so each has a function of its own (diffusers 0.42,
`set_timesteps` of each class).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vpo_jax.runtime.errors import UserError

Table = npt.NDArray[Any]


def ddim_timesteps(fields: Mapping[str, Any], steps: int) -> Table:
    """int32 [S], falling."""
    total = fields["num_train_timesteps"]
    if fields["timestep_spacing"] == "linspace":
        timesteps = np.linspace(0, total - 1, steps).round()[::-1]
    elif fields["timestep_spacing"] == "leading":
        timesteps = (np.arange(steps) * (total // steps))[::-1] + fields["steps_offset"]
    else:
        timesteps = _trailing(total, total, steps)
    if timesteps[0] >= total:
        raise UserError(
            f"num_inference_steps: {steps} steps with steps_offset {fields['steps_offset']} reach timestep "
            f"{int(timesteps[0])}, past the last one ({total - 1}); take fewer steps"
        )
    return timesteps.astype(np.int32)


def dpm_timesteps_and_sigmas(fields: Mapping[str, Any], alphas_cumprod: Table, steps: int) -> tuple[Table, Table]:
    """(int32 [S], float32 sigmas [S + 1]), falling; sigma = sqrt((1 - abar) / abar).

    "leading" and "linspace" divide into one step more than asked for and leave the last out.
    """
    total = fields["num_train_timesteps"]
    half_log_snr = 0.5 * (np.log(alphas_cumprod.astype(np.float64)) - np.log1p(-alphas_cumprod.astype(np.float64)))
    last = total - int(np.searchsorted(half_log_snr[::-1], fields["lambda_min_clipped"]))
    if fields["timestep_spacing"] == "linspace":
        timesteps = np.linspace(0, last - 1, steps + 1).round()[::-1][:-1]
    elif fields["timestep_spacing"] == "leading":
        timesteps = (np.arange(steps + 1) * (last // (steps + 1)))[::-1][:-1] + fields["steps_offset"]
    else:
        timesteps = _trailing(last, total, steps)
    levels = _sigmas(alphas_cumprod)
    if fields["use_karras_sigmas"]:
        sigmas = _karras(fields, levels[::-1], steps)
        timesteps = _nearest_timestep(sigmas, levels)
        if fields["beta_schedule"] != "squaredcos_cap_v2":
            timesteps = timesteps.round()
    else:
        sigmas = np.interp(timesteps, np.arange(len(levels)), levels)
    sigmas = np.append(sigmas, _last_sigma(fields, levels)).astype(np.float32)
    if (np.diff(sigmas) >= 0).any():
        raise UserError(
            f"num_inference_steps: {steps} steps repeat a noise level with timestep_spacing "
            f"{fields['timestep_spacing']!r}; take fewer steps"
        )
    return timesteps.astype(np.int32), sigmas


def euler_timesteps_and_sigmas(fields: Mapping[str, Any], alphas_cumprod: Table, steps: int) -> tuple[Table, Table]:
    """(float32 [S], not always whole numbers; float32 sigmas [S + 1]), falling."""
    total = fields["num_train_timesteps"]
    if fields["timestep_spacing"] == "linspace":
        timesteps = np.linspace(0, total - 1, steps, dtype=np.float32)[::-1]
    elif fields["timestep_spacing"] == "leading":
        timesteps = (np.arange(steps) * (total // steps))[::-1] + fields["steps_offset"]
    else:
        timesteps = _trailing(total, total, steps)
    levels = _sigmas(alphas_cumprod)
    if fields["interpolation_type"] == "linear":
        sigmas = np.interp(timesteps, np.arange(len(levels)), levels)
    else:
        sigmas = np.exp(np.linspace(np.log(levels[-1]), np.log(levels[0]), steps + 1))
    if fields["use_karras_sigmas"]:
        sigmas = _karras(fields, sigmas, steps)
        timesteps = _nearest_timestep(sigmas, levels)
    sigmas = np.append(sigmas, _last_sigma(fields, levels)).astype(np.float32)
    # "log_linear" has one level more than steps and therefore ends at the smallest of them.
    return timesteps.astype(np.float32), sigmas[: steps + 1]


def _trailing(last: int, total: int, steps: int) -> Table:
    timesteps = np.arange(last, 0, -total / steps).round() - 1
    if timesteps[-1] < 0:
        raise UserError(
            f"num_inference_steps: {steps} steps with timestep_spacing 'trailing' end at timestep -1 in diffusers; "
            "take one step more or less"
        )
    return timesteps


def _sigmas(alphas_cumprod: Table) -> Table:
    # In float32, as diffusers: Karras timesteps are cut to whole numbers, so the last bit can move one.
    return np.sqrt((np.float32(1.0) - alphas_cumprod) / alphas_cumprod)


def _last_sigma(fields: Mapping[str, Any], levels: Table) -> float:
    return 0.0 if fields["final_sigmas_type"] == "zero" else float(levels[0])


def _karras(fields: Mapping[str, Any], falling: Table, steps: int) -> Table:
    """Levels of Karras et al. 2022 (arXiv 2206.00364), equation 5, rho = 7."""
    smallest = float(falling[-1] if fields["sigma_min"] is None else fields["sigma_min"])
    largest = float(falling[0] if fields["sigma_max"] is None else fields["sigma_max"])
    ramp = np.linspace(0, 1, steps)
    return np.asarray((largest ** (1 / 7) + ramp * (smallest ** (1 / 7) - largest ** (1 / 7))) ** 7)


def _nearest_timestep(sigmas: Table, levels: Table) -> Table:
    """Timestep, with a fraction, whose sigma is the given one: linear in log sigma between neighbours."""
    log_sigmas, log_levels = np.log(np.maximum(sigmas, 1e-10)), np.log(levels)
    below = np.clip(np.searchsorted(log_levels, log_sigmas, side="right") - 1, 0, len(levels) - 2)
    low, high = log_levels[below], log_levels[below + 1]
    weight = np.clip((low - log_sigmas) / (low - high), 0, 1)
    return np.asarray((1 - weight) * below + weight * (below + 1))
