"""Which timesteps and noise levels a sampler visits: host tables, computed once.

The classes differ in small ways that change every video, so each has a function of its own (diffusers 0.42,
`set_timesteps` of each class).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.types import Table


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
    timesteps = _multistep_timesteps(fields, last, steps)
    levels = _sigmas(alphas_cumprod)
    if fields["use_karras_sigmas"]:
        sigmas = _karras(fields, levels[::-1], steps)
        timesteps = _nearest_timestep(sigmas, levels)
        if fields["beta_schedule"] != "squaredcos_cap_v2":
            timesteps = timesteps.round()
    else:
        sigmas = np.interp(timesteps, np.arange(len(levels)), levels)
    sigmas = np.append(sigmas, _last_sigma(fields, levels)).astype(np.float32)
    _check_falling(fields, sigmas, steps)
    return timesteps.astype(np.int32), sigmas


def unipc_timesteps_and_sigmas(fields: Mapping[str, Any], alphas_cumprod: Table, steps: int) -> tuple[Table, Table]:
    """(int32 [S], float32 sigmas [S + 1]), falling, of a variance-preserving process; as `dpm_timesteps_and_sigmas`.

    Karras levels are rounded to whole timesteps on every beta schedule, and "sigma_min" then repeats their last one.
    """
    timesteps = _multistep_timesteps(fields, fields["num_train_timesteps"], steps)
    levels = _sigmas(alphas_cumprod)
    if fields["use_karras_sigmas"]:
        sigmas = _karras(fields, levels[::-1], steps)
        timesteps = _nearest_timestep(sigmas, levels).round()
        if fields["final_sigmas_type"] != "zero":
            raise UserError(
                "scheduler_config.json: final_sigmas_type: 'sigma_min' repeats a level with use_karras_sigmas; "
                "set it to 'zero'"
            )
    else:
        sigmas = np.interp(timesteps, np.arange(len(levels)), levels)
    sigmas = np.append(sigmas, _last_sigma(fields, levels)).astype(np.float32)
    _check_falling(fields, sigmas, steps)
    return timesteps.astype(np.int32), sigmas


def unipc_flow_timesteps_and_sigmas(fields: Mapping[str, Any], steps: int) -> tuple[Table, Table]:
    """(int32 [S], float32 sigmas [S + 1]), falling from just below 1 to 0; timestep = T sigma, cut to a whole number.

    The grid before the shift has one level more, at 1 / T, which is left out. Older versions of diffusers and Wan's
    own code have another one: sigmas differ by up to 2.4e-3.
    """
    total = fields["num_train_timesteps"]
    sigmas = _shifted(fields["flow_shift"], np.linspace(1, 1 / total, steps + 1)[:-1])
    sigmas[0] -= 1e-6  # log(1 - sigma) stays finite
    return (sigmas * total).astype(np.int32), np.append(sigmas, 0).astype(np.float32)


def flow_euler_timesteps_and_sigmas(fields: Mapping[str, Any], steps: int) -> tuple[Table, Table]:
    """(float32 [S], float32 sigmas [S + 1]), falling from 1 to 0; timestep = T sigma with its fraction.

    The smallest level, 1 / T, is shifted, and the grid that ends there is shifted again.
    """
    total, shift = fields["num_train_timesteps"], fields["shift"]
    ends = np.asarray([1, np.float32(1) / np.float32(total)], np.float32)
    largest, smallest = (float(sigma) for sigma in _shifted(shift, ends))
    sigmas = _shifted(shift, np.linspace(largest * total, smallest * total, steps) / total).astype(np.float32)
    return sigmas * np.float32(total), np.append(sigmas, np.float32(0))


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


def _multistep_timesteps(fields: Mapping[str, Any], last: int, steps: int) -> Table:
    """Whole timesteps [S] below `last`, falling, as DPM-Solver++ and UniPC space them."""
    if fields["timestep_spacing"] == "linspace":
        return np.linspace(0, last - 1, steps + 1).round()[::-1][:-1]
    if fields["timestep_spacing"] == "leading":
        return np.asarray((np.arange(steps + 1) * (last // (steps + 1)))[::-1][:-1] + fields["steps_offset"])
    return _trailing(last, fields["num_train_timesteps"], steps)


def _check_falling(fields: Mapping[str, Any], sigmas: Table, steps: int) -> None:
    if (np.diff(sigmas) >= 0).any():
        raise UserError(
            f"num_inference_steps: {steps} steps repeat a noise level with timestep_spacing "
            f"{fields['timestep_spacing']!r}; take fewer steps"
        )


def _shifted(shift: float, sigmas: Table) -> Table:
    """Flow levels moved towards noise (Esser et al. 2024, arXiv 2403.03206, equation 23)."""
    return np.asarray(shift * sigmas / (1 + (shift - 1) * sigmas))


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
