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
    "UniPCMultistepScheduler": {
        **_COMMON,
        "solver_order": 2,
        "thresholding": False,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": (),
        "solver_p": None,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "timestep_spacing": "linspace",
        "final_sigmas_type": "zero",
        "use_dynamic_shifting": False,
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    # Predicts a flow velocity, always: it has neither betas nor a prediction type.
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "invert_sigmas": False,
        "shift_terminal": None,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "stochastic_sampling": False,
    },
}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "algorithm_type": ("dpmsolver++",),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete",),
    "variance_type": (None,),
    "solver_p": (None,),
    "shift_terminal": (None,),
}
# What one class honours in place of or beside the values above.
_OWN_CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "DPMSolverMultistepScheduler": {"solver_order": (1, 2), "solver_type": ("midpoint", "heun")},
    "UniPCMultistepScheduler": {
        "solver_order": (1, 2, 3),
        "solver_type": ("bh1", "bh2"),
        "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
        "use_flow_sigmas": (True, False),
    },
    "FlowMatchEulerDiscreteScheduler": {"use_karras_sigmas": (False,)},
}
_MUST_BE_OFF = (
    "thresholding",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
    "use_dynamic_shifting",
    "invert_sigmas",
    "stochastic_sampling",
)
_NUMBERS = ("beta_start", "beta_end", "scale_b", "clip_sample_range", "lambda_min_clipped", "flow_shift", "shift")
_MOST_TIMESTEPS = 100_000
_BOOLEANS = (
    "use_scale",
    "rescale_betas_zero_snr",
    "clip_sample",
    "set_alpha_to_one",
    "lower_order_final",
    "euler_at_final",
    "use_karras_sigmas",
    "use_flow_sigmas",
    "predict_x0",
)
# Other solvers' values that a class turns into its own.
_ALIASES: dict[str, dict[str, dict[str, str]]] = {
    "DPMSolverMultistepScheduler": {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
    },
    "UniPCMultistepScheduler": {"solver_type": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}},
}


def resolve(config: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """Every field that the scheduler class reads, with its value; `_class_name` names the class.

    `name` None takes the config's own `_class_name`; another one of `DEFAULTS` is `NAME.from_config(config)`.
    Raises UserError for a class that is not here and for a value that is not honoured, by the field's name.
    """
    chosen = config.get("_class_name") if name is None else name
    if not isinstance(chosen, str) or chosen not in DEFAULTS:
        supported = ", ".join(DEFAULTS)
        if name is not None:
            raise UserError(f"sampler: {chosen!r} is not supported; choose one of {supported}")
        raise UserError(
            f"scheduler_config.json: _class_name: {chosen!r} is not supported; choose another sampler by "
            "rollout.sampler in a training's config, --sampler of vpo_jax.evaluate or sampler= of a pipeline's call, "
            f"one of {supported}"
        )
    unset = config.get("_use_default_values")
    left_to_defaults = {name for name in unset if isinstance(name, str)} if isinstance(unset, list | tuple) else set()
    fields = {
        key: config[key] if key in config and key not in left_to_defaults else default
        for key, default in DEFAULTS[chosen].items()
    }
    for key, aliases in _ALIASES.get(chosen, {}).items():
        fields[key] = aliases.get(fields[key], fields[key]) if isinstance(fields[key], str) else fields[key]
    fields["_class_name"] = chosen
    _check_same_process(config, fields)
    _check_values(fields, _CHOICES | _OWN_CHOICES.get(chosen, {}))
    if chosen != "FlowMatchEulerDiscreteScheduler":
        _check_variance_preserving(fields)
    if fields.get("use_scale") and chosen != "DDIMScheduler":
        raise _refusal("use_scale", True, f"is not supported by {chosen}; sample with DDIMScheduler")
    if chosen == "UniPCMultistepScheduler":
        _check_unipc(fields)
    return fields


def is_flow(fields: Mapping[str, Any]) -> bool:
    """Whether the fields that `resolve` returns are those of rectified flow; else they preserve variance."""
    if fields["_class_name"] == "UniPCMultistepScheduler":
        return bool(fields["use_flow_sigmas"])
    return bool(fields["_class_name"] == "FlowMatchEulerDiscreteScheduler")


def with_shift(config: Mapping[str, Any], shift: float | None, name: str = "shift") -> Mapping[str, Any]:
    """The config of a flow model with another shift for whichever class samples; as it is where `shift` is None or 0.

    Raises:
      UserError: naming `name`: the model is no flow.
    """
    if not shift:
        return config
    if shift < 0.0:
        raise UserError(f"{name}: {shift} must be above 0; leave it out for the checkpoint's own")
    if not is_flow(resolve(config)):
        raise UserError(f"{name}: {shift} is for flow models, and scheduler_config.json is of another; leave it out")
    return {**config, "flow_shift": float(shift), "shift": float(shift)}


def _check_values(fields: Mapping[str, Any], choices: Mapping[str, tuple[Any, ...]]) -> None:
    for key, value in fields.items():
        if key in choices:
            if value not in choices[key]:
                honoured = ", ".join(str(choice) for choice in choices[key])
                raise _refusal(key, value, f"is not supported; choose of: {honoured}")
        elif key in _MUST_BE_OFF and value:
            raise _refusal(key, value, "is not supported; set it to false or choose another sampler")
        if key in _BOOLEANS and not isinstance(value, bool | None):
            raise _refusal(key, value, "must be true or false")
        if key in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise _refusal(key, value, "must be a number")
        if key in ("flow_shift", "shift") and not value > 0:
            raise _refusal(key, value, "must be above 0")
        if key in ("beta_start", "beta_end") and not 0 < value < 1:
            raise _refusal(key, value, "must be above 0 and below 1")
    steps = fields["num_train_timesteps"]
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= _MOST_TIMESTEPS:
        raise _refusal("num_train_timesteps", steps, f"must be a positive integer up to {_MOST_TIMESTEPS}")


def _check_variance_preserving(fields: Mapping[str, Any]) -> None:
    steps, offset = fields["num_train_timesteps"], fields["steps_offset"]
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


def _check_unipc(fields: Mapping[str, Any]) -> None:
    flow, prediction_type = bool(fields["use_flow_sigmas"]), fields["prediction_type"]
    if flow != (prediction_type == "flow_prediction"):
        wanted = "true" if prediction_type == "flow_prediction" else "false"
        raise _refusal(
            "use_flow_sigmas", flow, f"does not fit prediction_type {prediction_type!r}, which needs it {wanted}"
        )
    if flow:
        # Another grid of noise levels each; diffusers divides by zero at the repeated last level.
        if fields["use_karras_sigmas"]:
            raise _refusal("use_karras_sigmas", True, "is not supported with use_flow_sigmas; set it to false")
        if fields["final_sigmas_type"] != "zero":
            raise _refusal("final_sigmas_type", "sigma_min", "repeats a level with use_flow_sigmas; set it to 'zero'")
        if not fields["predict_x0"]:
            raise _refusal("predict_x0", False, "is not supported with use_flow_sigmas; set it to true")
    if fields["final_sigmas_type"] == "zero":
        # The step to sigma 0 is infinitely long in log SNR: only the first order in x_0 has a limit.
        if not fields["predict_x0"]:
            raise _refusal("predict_x0", False, "needs final_sigmas_type 'sigma_min'")
        if not fields["lower_order_final"] and fields["solver_order"] > 1:
            raise _refusal("lower_order_final", False, "needs final_sigmas_type 'sigma_min' or solver_order 1")
    disabled = fields["disable_corrector"]
    if not isinstance(disabled, list | tuple) or not all(isinstance(step, int) for step in disabled):
        raise _refusal("disable_corrector", disabled, "must be a list of steps")


def _check_same_process(config: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Refuses another sampler that takes a flow checkpoint for a variance-preserving one, or the reverse.

    diffusers' `from_config` does so without a word.
    """
    own, chosen = config.get("_class_name"), fields["_class_name"]
    if own in (None, chosen):  # a file without a class is one of the class that reads it
        return
    trained = own == "FlowMatchEulerDiscreteScheduler" or config.get("prediction_type") == "flow_prediction"
    if trained != is_flow(fields):
        kind, works = ("a flow", "FlowMatchEulerDiscreteScheduler") if trained else ("no flow", "DDIMScheduler")
        raise UserError(
            f"sampler: {chosen} does not fit: the checkpoint is {kind} model (scheduler_config.json: _class_name "
            f"{own!r}, prediction_type {config.get('prediction_type')!r}); choose {works}"
        )


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _refusal(key: str, value: Any, what: str) -> UserError:
    return UserError(f"scheduler_config.json: {key}: {value!r} {what}")
