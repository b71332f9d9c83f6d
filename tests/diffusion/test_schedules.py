"""Noise schedules, noising and training targets against diffusers."""

from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_jax.diffusion.schedules import add_noise, make_schedule, to_clean_and_noise, training_target
from vpo_jax.runtime.errors import UserError

torch.set_num_threads(1)

# A few float32 roundings; the project's promise is 1e-5.
TOLERANCE = 1e-6

CONFIGS: list[dict[str, Any]] = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 77},
    {"num_train_timesteps": 40, "trained_betas": np.geomspace(1e-3, 0.3, 40).tolist()},
    {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
    {"beta_schedule": "linear", "rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_alphas_cumprod_equals_diffusers(name, config):
    theirs = getattr(diffusers, name)(**config).alphas_cumprod.numpy()
    ours = make_schedule({"_class_name": name, **config}).alphas_cumprod
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_noising_and_v_targets_equal_diffusers(config):
    theirs = diffusers.DDIMScheduler(**config, prediction_type="v_prediction")
    ours = make_schedule({"_class_name": "DDIMScheduler", **config, "prediction_type": "v_prediction"})
    rng = np.random.default_rng(0)
    clean, noise = (rng.standard_normal((6, 2, 3, 3, 4)).astype(np.float32) for _ in range(2))
    timesteps = np.append(rng.integers(0, theirs.config.num_train_timesteps, 5), theirs.config.num_train_timesteps - 1)
    arguments = [torch.from_numpy(x) for x in (clean, noise, timesteps)]
    np.testing.assert_allclose(
        add_noise(ours, clean, noise, timesteps), theirs.add_noise(*arguments), rtol=TOLERANCE, atol=TOLERANCE
    )
    np.testing.assert_allclose(
        training_target(ours, clean, noise, timesteps), theirs.get_velocity(*arguments), rtol=TOLERANCE, atol=TOLERANCE
    )


def test_epsilon_and_sample_models_are_trained_on_noise_and_clean():
    clean, noise, timesteps = jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.array([1, 5])
    for prediction, expected in (("epsilon", noise), ("sample", clean)):
        schedule = make_schedule({"_class_name": "DDIMScheduler", "prediction_type": prediction})
        assert training_target(schedule, clean, noise, timesteps) is expected


@settings(deadline=None, max_examples=40)
@given(
    prediction_type=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    beta_schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    timestep=st.integers(50, 700),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_training_target_leads_back_to_clean_and_noise(prediction_type, beta_schedule, timestep, seed):
    schedule = make_schedule(
        {"_class_name": "DDIMScheduler", "prediction_type": prediction_type, "beta_schedule": beta_schedule}
    )
    clean, noise = jax.random.normal(jax.random.key(seed), (2, 1, 4, 3))
    timesteps = jnp.array([timestep])
    noisy = add_noise(schedule, clean, noise, timesteps)
    target = training_target(schedule, clean, noise, timesteps)
    found = to_clean_and_noise(schedule, target, noisy, timesteps)
    # Rounding of x_t is amplified by at most 1 / min(signal, noise) in this range of timesteps.
    np.testing.assert_allclose(found[0], clean, atol=1e-4)
    np.testing.assert_allclose(found[1], noise, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    beta_schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    count=st.integers(2, 400),
    zero_snr=st.booleans(),
)
def test_noise_only_grows_with_the_timestep(beta_schedule, count, zero_snr):
    schedule = make_schedule(
        {
            "_class_name": "DDIMScheduler",
            "beta_schedule": beta_schedule,
            "num_train_timesteps": count,
            "rescale_betas_zero_snr": zero_snr,
        }
    )
    assert (np.diff(schedule.alphas_cumprod) < 0).all()
    assert (schedule.alphas_cumprod[-1] == 0) == zero_snr
    np.testing.assert_allclose(schedule.signal**2 + schedule.noise**2, 1, atol=3e-7)


SCALED = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "use_scale": True,
    "scale_b": 0.7,
}


def test_the_scaled_schedule_weakens_the_signal_as_lvdm_does():
    """q_sample of lvdm's LatentDiffusion with use_scale, in torch."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    scale = torch.cat([torch.linspace(1, 0.7, 400, dtype=torch.float64), torch.full((600,), 0.7, dtype=torch.float64)])
    rng = np.random.default_rng(0)
    clean, noise = (rng.standard_normal((5, 2, 3, 3, 4)).astype(np.float32) for _ in range(2))
    timesteps = np.array([0, 10, 399, 400, 999])
    at = lambda table: table[timesteps].reshape(-1, 1, 1, 1, 1)  # noqa: E731
    expected = at(abar.sqrt() * scale) * torch.from_numpy(clean) + at((1 - abar).sqrt()) * torch.from_numpy(noise)
    schedule = make_schedule(SCALED)
    found = add_noise(schedule, clean, noise, timesteps)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    back = to_clean_and_noise(schedule, jnp.asarray(noise), found, timesteps)[0]
    np.testing.assert_allclose(back[:3], clean[:3], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"prediction_type": "v_prediction"}, "use_scale"),
        ({"_class_name": "EulerDiscreteScheduler"}, "use_scale"),
        ({"scale_b": 0.0}, "scale_b"),
        ({"use_scale": "yes"}, "use_scale"),
    ],
)
def test_a_scaled_schedule_that_is_not_honoured_is_refused_by_name(change, field):
    with pytest.raises(UserError, match=field):
        make_schedule({**SCALED, **change})
