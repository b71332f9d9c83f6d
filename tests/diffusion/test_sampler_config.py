"""Which scheduler configs are refused, each by the field's name."""

import pytest

from vpo_jax.diffusion.config import with_shift
from vpo_jax.diffusion.process import make_process
from vpo_jax.diffusion.samplers import make_sampler
from vpo_jax.runtime.errors import UserError

DDIM, DPM, EULER = "DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"
UNIPC, FLOW_EULER = "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize("name", [DDIM, DPM, EULER])
def test_a_sampler_of_another_process_is_refused_with_one_that_works(name):
    config = {"_class_name": UNIPC, **FLOW}
    with pytest.raises(UserError, match=f"sampler: {name} does not fit: .* choose {FLOW_EULER}"):
        make_sampler(config, 5, name=name)
    make_sampler(config, 5, name=FLOW_EULER)
    with pytest.raises(UserError, match=f"sampler: {FLOW_EULER} does not fit: .* choose {DDIM}"):
        make_sampler({"_class_name": name}, 5, name=FLOW_EULER)
    make_sampler({"_class_name": name}, 5, name=DDIM)


def test_an_unknown_class_is_refused_with_the_fields_that_choose_another():
    with pytest.raises(UserError, match=r"_class_name: 'PNDMScheduler'.*rollout.sampler.*--sampler.*sampler="):
        make_sampler({"_class_name": "PNDMScheduler"}, 5)
    make_sampler({"_class_name": "PNDMScheduler"}, 5, name=DDIM)


@pytest.mark.parametrize(
    ("name", "config", "steps", "named"),
    [
        ("PNDMScheduler", {}, 5, "_class_name"),
        (None, {}, 5, "_class_name"),
        (DDIM, {"thresholding": True}, 5, "thresholding"),
        (DDIM, {"beta_schedule": "sigmoid"}, 5, "beta_schedule"),
        (DDIM, {"prediction_type": "flow_prediction"}, 5, "prediction_type"),
        (DDIM, {"timestep_spacing": "log"}, 5, "timestep_spacing"),
        (DDIM, {"num_train_timesteps": "1000"}, 5, "num_train_timesteps"),
        (DDIM, {"beta_end": 1.7}, 5, "beta_end"),
        (DDIM, {"beta_end": "0.02"}, 5, "beta_end"),
        (DDIM, {"clip_sample": "no"}, 5, "clip_sample"),
        (DDIM, {"trained_betas": [0.1, 0.2]}, 5, "trained_betas"),
        (DDIM, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 5, "rescale_betas_zero_snr"),
        (DDIM, {"steps_offset": 1}, 1000, "steps_offset"),
        (DDIM, {}, 1001, "num_inference_steps"),
        (DDIM, {}, 0, "num_inference_steps"),
        (DPM, {"algorithm_type": "sde-dpmsolver++"}, 5, "algorithm_type"),
        (DPM, {"solver_order": 3}, 5, "solver_order"),
        (DPM, {"use_lu_lambdas": True}, 5, "use_lu_lambdas"),
        (DPM, {"use_flow_sigmas": True}, 5, "use_flow_sigmas"),
        (DPM, {"variance_type": "learned"}, 5, "variance_type"),
        (DPM, {"timestep_spacing": "leading"}, 1000, "num_inference_steps"),
        (EULER, {"timestep_type": "continuous"}, 5, "timestep_type"),
        (EULER, {"use_beta_sigmas": True}, 5, "use_beta_sigmas"),
        (UNIPC, {"solver_order": 4}, 5, "solver_order"),
        (UNIPC, {"solver_type": "bh3"}, 5, "solver_type"),
        (UNIPC, {"solver_p": {}}, 5, "solver_p"),
        (UNIPC, {"disable_corrector": 1}, 5, "disable_corrector"),
        (UNIPC, {"predict_x0": False}, 5, "predict_x0"),
        (UNIPC, {"lower_order_final": False}, 5, "lower_order_final"),
        (UNIPC, {"use_flow_sigmas": True}, 5, "use_flow_sigmas"),
        (UNIPC, {"prediction_type": "flow_prediction"}, 5, "use_flow_sigmas"),
        (UNIPC, {"use_dynamic_shifting": True}, 5, "use_dynamic_shifting"),
        (UNIPC, {**FLOW, "use_karras_sigmas": True}, 5, "use_karras_sigmas"),
        (UNIPC, {**FLOW, "final_sigmas_type": "sigma_min"}, 5, "final_sigmas_type"),
        (UNIPC, {**FLOW, "predict_x0": False}, 5, "predict_x0"),
        (UNIPC, {**FLOW, "flow_shift": 0.0}, 5, "flow_shift"),
        (UNIPC, {**FLOW, "shift_terminal": 0.1}, 5, "shift_terminal"),
        (UNIPC, {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, 5, "final_sigmas_type"),
        (FLOW_EULER, {"use_dynamic_shifting": True}, 5, "use_dynamic_shifting"),
        (FLOW_EULER, {"shift": "3"}, 5, "shift"),
        (FLOW_EULER, {"invert_sigmas": True}, 5, "invert_sigmas"),
        (FLOW_EULER, {"stochastic_sampling": True}, 5, "stochastic_sampling"),
        (FLOW_EULER, {"use_karras_sigmas": True}, 5, "use_karras_sigmas"),
        (FLOW_EULER, {"num_train_timesteps": 0}, 5, "num_train_timesteps"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(name, config, steps, named):
    with pytest.raises(UserError, match=named):
        make_sampler({"_class_name": name, **config}, steps)


def test_eta_outside_0_to_1_is_refused():
    with pytest.raises(UserError, match="eta"):
        make_sampler({"_class_name": DDIM}, 5, eta=1.5)


@pytest.mark.parametrize("name", [UNIPC, FLOW_EULER])
def test_another_shift_reaches_whichever_class_samples(name):
    config = {"_class_name": UNIPC, **FLOW, "flow_shift": 3.0}
    wanted = {"_class_name": UNIPC, **FLOW, "flow_shift": 12.0}
    if name == FLOW_EULER:
        wanted = {"_class_name": FLOW_EULER, "shift": 12.0}
    shifted = make_sampler(with_shift(config, 12.0), 7, name=name)
    assert list(shifted.timesteps) == list(make_sampler(wanted, 7).timesteps)
    assert list(shifted.timesteps) != list(make_sampler(config, 7, name=name).timesteps)
    assert make_process(with_shift(config, 12.0)).shift == 12.0
    assert with_shift(config, 0.0) is config and with_shift(config, None) is config


def test_a_model_that_is_no_flow_has_no_shift():
    with pytest.raises(UserError, match=r"rollout\.shift: 3\.0 is for flow models"):
        with_shift({"_class_name": DDIM}, 3.0, "rollout.shift")
    with pytest.raises(UserError, match=r"shift: -1\.0 must be above 0"):
        with_shift({"_class_name": UNIPC, **FLOW}, -1.0)
