"""scheduler_config.json as each diffusers scheduler class reads it.

A field that is missing takes the default of the class that reads it, and the classes differ. `resolve` with another
class's name gives what diffusers' `NAME.from_config(config)` makes: the fields that NAME knows are kept, those that
the file left to its own class's defaults fall to NAME's defaults, the rest is ignored. Source of the defaults and
of the rules: diffusers 0.42 (`schedulers/scheduling_*.py`, `configuration_utils.ConfigMixin.extract_init_dict`).
"""

import math
from collections.abc import Mapping
from typing import Any

from vpo_jax.runtime.errors import UserError

_COMMON: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    # VideoCrafter2's: no class of diffusers reads them.
    "use_scale": False,
    "scale_b": 0.7,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {
        **_COMMON,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "thresholding": False,
        "timestep_spacing": "leading",
    },
    "DPMSolverMultistepScheduler": {
        **_COMMON,
        "solver_order": 2,
        "thresholding": False,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
        "timestep_spacing": "linspace",
        "use_dynamic_shifting": False,
        # Not this class's own, yet diffusers reads them where the file has them (`_convert_to_karras`).
        "sigma_min": None,
        "sigma_max": None,
    },
    "EulerDiscreteScheduler": {
        **_COMMON,
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "sigma_min": None,
        "sigma_max": None,
        "timestep_spacing": "linspace",
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    },
}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (1, 2),
    "solver_type": ("midpoint", "heun"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete",),
    "variance_type": (None,),
}
_MUST_BE_OFF = (
    "thresholding",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "use_dynamic_shifting",
)
_NUMBERS = ("beta_start", "beta_end", "scale_b", "clip_sample_range", "lambda_min_clipped")
_MOST_TIMESTEPS = 100_000
_BOOLEANS = (
    "use_scale",
    "rescale_betas_zero_snr",
    "clip_sample",
    "set_alpha_to_one",
    "lower_order_final",
    "euler_at_final",
    "use_karras_sigmas",
)
# Other solvers' values that DPMSolverMultistepScheduler turns into its own.
_ALIASES = {
    "algorithm_type": {"deis": "dpmsolver++"},
    "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
}


def resolve(config: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """Every field that the scheduler class reads, with its value; `_class_name` names the class.

    `name` None takes the config's own `_class_name`; another one of `DEFAULTS` is `NAME.from_config(config)`.
    Raises UserError for a class that is not here and for a value that is not honoured, by the field's name.
    """
    chosen = config.get("_class_name") if name is None else name
    if not isinstance(chosen, str) or chosen not in DEFAULTS:
        where = "scheduler_config.json: _class_name" if name is None else "sampler"
        raise UserError(f"{where}: {chosen!r} is not supported; choose a sampler of {', '.join(DEFAULTS)}")
    unset = config.get("_use_default_values")
    left_to_defaults = {name for name in unset if isinstance(name, str)} if isinstance(unset, list | tuple) else set()
    fields = {
        key: config[key] if key in config and key not in left_to_defaults else default
        for key, default in DEFAULTS[chosen].items()
    }
    if chosen == "DPMSolverMultistepScheduler":
        for key, aliases in _ALIASES.items():
            fields[key] = aliases.get(fields[key], fields[key]) if isinstance(fields[key], str) else fields[key]
    _check(fields)
    if fields["use_scale"] and chosen != "DDIMScheduler":
        raise _refusal("use_scale", True, f"is not supported by {chosen}; sample with DDIMScheduler")
    return {"_class_name": chosen, **fields}


def _check(fields: Mapping[str, Any]) -> None:
    for key, value in fields.items():
        if key in _CHOICES and value not in _CHOICES[key]:
            choices = ", ".join(str(choice) for choice in _CHOICES[key])
            raise _refusal(key, value, f"is not supported; choose of: {choices}")
        if key in _MUST_BE_OFF and value:
            raise _refusal(key, value, "is not supported; set it to false or choose another sampler")
        if key in _BOOLEANS and not isinstance(value, bool | None):
            raise _refusal(key, value, "must be true or false")
        if key in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise _refusal(key, value, "must be a number")
        if key in ("beta_start", "beta_end") and not 0 < value < 1:
            raise _refusal(key, value, "must be above 0 and below 1")
    steps = fields["num_train_timesteps"]
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= _MOST_TIMESTEPS:
        raise _refusal("num_train_timesteps", steps, f"must be a positive integer up to {_MOST_TIMESTEPS}")
    offset = fields["steps_offset"]
    if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset <= steps:
        raise _refusal("steps_offset", offset, "must be an integer of 0 or more, up to num_train_timesteps")
    if fields["use_scale"] and fields["prediction_type"] == "v_prediction":
        raise _refusal("use_scale", True, "is not supported with prediction_type 'v_prediction'")
    if not fields["scale_b"] > 0:
        raise _refusal("scale_b", fields["scale_b"], "must be above 0")
    betas = fields["trained_betas"]
    if betas is not None and not (isinstance(betas, list | tuple) and all(_is_share(beta) for beta in betas)):
        raise _refusal("trained_betas", "a list", "must hold numbers from 0 to 1")
    if betas is not None and len(betas) != steps:
        raise _refusal("trained_betas", f"{len(betas)} values", f"must have num_train_timesteps = {steps} values")


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _refusal(key: str, value: Any, what: str) -> UserError:
    return UserError(f"scheduler_config.json: {key}: {value!r} {what}")
