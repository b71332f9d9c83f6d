"""Trajectories end where plain sampling ends, and a step's log-probability is a Gaussian's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.diffusion.samplers import SamplerState, make_sampler, sample
from vpo_jax.diffusion.trajectory import check_stochastic, log_probability, sample_trajectory
from vpo_jax.runtime.errors import UserError

CONFIG = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 100,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
}
SHAPE = (3, 2, 4, 4, 4)


def denoise(latents, timestep):
    return jnp.tanh(latents * (1.0 + 0.01 * timestep)) + 0.1 * jnp.roll(latents, 1, axis=1)


def keys_of(kind):
    return jax.random.key(3) if kind == "one" else jax.random.split(jax.random.key(3), SHAPE[0])


@pytest.mark.parametrize("kind", ["one", "each"])
@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_a_trajectory_ends_at_the_bits_of_plain_sampling(kind, eta):
    sampler, key = make_sampler(CONFIG, 5, None, eta), keys_of(kind)
    noise = jax.random.normal(jax.random.key(0), SHAPE)
    plain = jax.jit(lambda noise, key: sample(sampler, denoise, noise, key))(noise, key)
    path = jax.jit(lambda noise, key: sample_trajectory(sampler, denoise, noise, key))(noise, key)
    assert path.latents.shape == (3, 6, *SHAPE[1:]) and path.log_probabilities.shape == (3, 5)
    np.testing.assert_array_equal(path.latents[:, 0], noise)
    np.testing.assert_array_equal(path.latents[:, -1], plain)


def test_a_steps_log_probability_is_the_mean_log_density_of_its_gaussian():
    sampler = make_sampler(CONFIG, 5, None, 1.0)
    noise = jax.random.normal(jax.random.key(0), SHAPE)
    path = sample_trajectory(sampler, denoise, noise, jax.random.key(1))
    table = {name: np.asarray(values, np.float64) for name, values in sampler.coefficients._asdict().items()}
    for i, timestep in enumerate(sampler.timesteps):
        before, after = (np.asarray(path.latents[:, j], np.float64) for j in (i, i + 1))
        prediction = np.asarray(denoise(path.latents[:, i], timestep), np.float64)
        clean = table["clean_of_sample"][i] * before + table["clean_of_prediction"][i] * prediction
        eps = table["noise_of_sample"][i] * before + table["noise_of_prediction"][i] * prediction
        mean, s = table["next_of_clean"][i] * clean + table["next_of_noise"][i] * eps, table["fresh_noise"][i]
        if s == 0.0:
            np.testing.assert_array_equal(path.log_probabilities[:, i], 0.0)
            continue
        density = np.exp(-0.5 * ((after - mean) / s) ** 2) / (s * np.sqrt(2 * np.pi))
        # float32: (after - mean) / s loses digits where s is small.
        np.testing.assert_allclose(path.log_probabilities[:, i], np.log(density).mean(axis=(1, 2, 3, 4)), rtol=1e-3)
    # The last step goes to the clean video and draws nothing.
    assert (sampler.coefficients.fresh_noise[:-1] > 0).all() and sampler.coefficients.fresh_noise[-1] == 0.0


def test_the_gradient_of_a_log_probability_leads_towards_what_was_sampled():
    sampler = make_sampler(CONFIG, 5, None, 1.0)
    before, after, prediction = jax.random.normal(jax.random.key(4), (3, *SHAPE))

    def total(prediction):
        return jnp.sum(log_probability(sampler, 1, before, prediction, after))

    moved = prediction + 0.05 * jax.grad(total)(prediction)
    assert float(total(moved)) > float(total(prediction))

    def distance(prediction):
        return float(jnp.sum((sampler.advance(SamplerState(before), 1, prediction, None).sample - after) ** 2))

    assert distance(moved) < distance(prediction)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_a_sampler_without_fresh_noise_is_refused_with_the_advice_that_works(name):
    eta = 0.0 if name == "DDIMScheduler" else 1.0
    with pytest.raises(UserError, match=rf"{name} does not.*rollout\.sampler=DDIMScheduler and rollout\.eta=1\.0"):
        check_stochastic(make_sampler(CONFIG, 5, name, eta))
    check_stochastic(make_sampler({**CONFIG, "_class_name": name}, 5, "DDIMScheduler", 1.0))
