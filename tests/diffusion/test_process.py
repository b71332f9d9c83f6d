"""Noise processes: levels, noising, training targets and timesteps, against diffusers and in distribution."""

import dataclasses
import math
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vpo_jax.diffusion.process import RectifiedFlow, make_process
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


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_alphas_cumprod_equals_diffusers(name, config):
    theirs = getattr(diffusers, name)(**config).alphas_cumprod.numpy()
    ours = make_process({"_class_name": name, **config}).alphas_cumprod
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_noising_and_v_targets_equal_diffusers(config):
    theirs = diffusers.DDIMScheduler(**config, prediction_type="v_prediction")
    ours = make_process({"_class_name": "DDIMScheduler", **config, "prediction_type": "v_prediction"})
    rng = np.random.default_rng(0)
    clean, noise = (rng.standard_normal((6, 2, 3, 3, 4)).astype(np.float32) for _ in range(2))
    timesteps = np.append(rng.integers(0, theirs.config.num_train_timesteps, 5), theirs.config.num_train_timesteps - 1)
    arguments = [torch.from_numpy(x) for x in (clean, noise, timesteps)]
    np.testing.assert_allclose(
        ours.add_noise(clean, noise, timesteps), theirs.add_noise(*arguments), rtol=TOLERANCE, atol=TOLERANCE
    )
    np.testing.assert_allclose(
        ours.target(clean, noise, timesteps), theirs.get_velocity(*arguments), rtol=TOLERANCE, atol=TOLERANCE
    )


def test_epsilon_and_sample_models_are_trained_on_noise_and_clean():
    clean, noise, timesteps = jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.array([1, 5])
    for prediction, expected in (("epsilon", noise), ("sample", clean)):
        process = make_process({"_class_name": "DDIMScheduler", "prediction_type": prediction})
        assert process.target(clean, noise, timesteps) is expected


@settings(deadline=None, max_examples=40)
@given(
    prediction_type=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    beta_schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    timestep=st.integers(50, 700),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_training_target_leads_back_to_clean_and_noise(prediction_type, beta_schedule, timestep, seed):
    process = make_process(
        {"_class_name": "DDIMScheduler", "prediction_type": prediction_type, "beta_schedule": beta_schedule}
    )
    clean, noise = jax.random.normal(jax.random.key(seed), (2, 1, 4, 3))
    timesteps = jnp.array([timestep])
    noisy = process.add_noise(clean, noise, timesteps)
    target = process.target(clean, noise, timesteps)
    found = process.to_clean_and_noise(target, noisy, timesteps)
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
    process = make_process(
        {
            "_class_name": "DDIMScheduler",
            "beta_schedule": beta_schedule,
            "num_train_timesteps": count,
            "rescale_betas_zero_snr": zero_snr,
        }
    )
    assert (np.diff(process.alphas_cumprod) < 0).all()
    assert (process.alphas_cumprod[-1] == 0) == zero_snr
    np.testing.assert_allclose(process.signal**2 + process.noise**2, 1, atol=3e-7)


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
    process = make_process(SCALED)
    found = process.add_noise(clean, noise, timesteps)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    back = process.to_clean_and_noise(jnp.asarray(noise), found, timesteps)[0]
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
        make_process({**SCALED, **change})


UNIPC_FLOW = {
    "_class_name": "UniPCMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 5.0,
}
EULER_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def test_whole_timesteps_are_drawn_as_by_randint():
    process, key = make_process({"_class_name": "DDIMScheduler"}), jax.random.key(4)
    for low, high, bounds in (
        (0.0, 1.0, (0, 1000)),
        (0.25, 0.5, (250, 500)),
        (0.5, 0.5, (500, 501)),
        (1, 1, (999, 1000)),
    ):
        found = process.draw_timesteps(key, low, high)
        assert found.dtype == jnp.int32 and found == jax.random.randint(key, (), *bounds)


def test_a_flow_is_noised_and_trained_on_its_velocity():
    process = make_process(UNIPC_FLOW)
    clean, noise = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    timesteps = jnp.asarray([0.0, 1.5, 400.0, 999.9, 1000.0], jnp.float32)
    sigma = (timesteps / 1000)[:, None, None]
    noisy, target = process.add_noise(clean, noise, timesteps), process.target(clean, noise, timesteps)
    np.testing.assert_allclose(noisy, (1 - sigma) * clean + sigma * noise, atol=1e-6)
    np.testing.assert_array_equal(target, noise - clean)
    found = process.to_clean_and_noise(target, noisy, timesteps)
    np.testing.assert_allclose(found[0], clean, atol=1e-6)
    np.testing.assert_allclose(found[1], noise, atol=1e-6)


@pytest.mark.parametrize(("config", "shift"), [(UNIPC_FLOW, 5.0), (EULER_FLOW, 3.0)])
def test_a_flow_config_brings_its_shift(config, shift):
    process = make_process({**config, "num_train_timesteps": 500})
    assert isinstance(process, RectifiedFlow)
    assert (process.shift, process.num_train_timesteps, process.density) == (shift, 500, "logit_normal")


@pytest.mark.parametrize("density", ["logit_normal", "uniform"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.6), (0.6, 1.0), (0.0, 0.01), (0.995, 1.0)])
@pytest.mark.parametrize(("shift", "mean", "std"), [(1.0, 0.0, 1.0), (5.0, -0.4, 1.3)])
def test_flow_timesteps_follow_their_density_between_low_and_high(density, low, high, shift, mean, std):
    process = RectifiedFlow(shift=shift, density=density, mean=mean, std=std)
    keys = jax.random.split(jax.random.key(7), 4000)
    drawn = jax.jit(jax.vmap(lambda key: process.draw_timesteps(key, low, high)))(keys)
    assert drawn.dtype == jnp.float32 and not np.array_equal(drawn, np.round(drawn))
    sigma = np.asarray(drawn, np.float64) / 1000
    share = sigma / (shift - (shift - 1) * sigma)
    assert share.min() >= low - 1e-6 and share.max() <= high + 1e-6

    def cdf(u):
        with np.errstate(divide="ignore"):
            whole = scipy.stats.norm.cdf((np.log(u) - np.log1p(-u) - mean) / std) if density == "logit_normal" else u
        return whole

    first, last = cdf(np.asarray([low, high], np.float64))
    distance = scipy.stats.kstest(np.clip(share, low, high), lambda u: (cdf(u) - first) / (last - first)).statistic
    # 1.95 / sqrt(N) is the Kolmogorov-Smirnov bound at one draw in a thousand.
    assert distance < 1.95 / math.sqrt(len(keys))


def test_a_density_beyond_float32s_reach_still_gives_a_timestep_in_its_bounds():
    drawn = RectifiedFlow(std=0.01).draw_timesteps(jax.random.key(0), 0.9, 0.95)
    assert 900.0 - 1e-3 <= drawn <= 950.0 + 1e-3


@pytest.mark.parametrize("change", [{"density": "cosine"}, {"shift": 0.0}, {"std": 0.0}])
def test_a_wrong_density_is_refused_by_name(change):
    with pytest.raises(UserError, match=next(iter(change))):
        dataclasses.replace(make_process(EULER_FLOW), **change)


def test_classes_of_the_same_levels_can_be_trained_on_though_not_sampled_with():
    fields = {"beta_schedule": "scaled_linear", "beta_end": 0.012}
    theirs = diffusers.PNDMScheduler(**fields).alphas_cumprod.numpy()
    ours = make_process({"_class_name": "PNDMScheduler", **fields}).alphas_cumprod
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=0)
    with pytest.raises(UserError, match="_class_name: 'CogVideoXDDIMScheduler': the noise levels"):
        make_process({"_class_name": "CogVideoXDDIMScheduler"})
