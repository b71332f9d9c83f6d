"""Every sampler against the diffusers scheduler of the same config."""

import json
import warnings
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vpo_jax.diffusion.samplers import Sampler, make_sampler, sample
from vpo_jax.runtime.errors import UserError

torch.set_num_threads(1)

# The project's promise: 1e-5 of the output's largest value, a hundred float32 roundings.
TOLERANCE = 1e-5
SHAPE = (2, 3, 4, 2)

DDIM, DPM, EULER = "DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"
UNIPC, FLOW_EULER = "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
MODELSCOPE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
COSINE_V = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False}
ZERO_SNR = {**MODELSCOPE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}

SHARED: list[tuple[str, dict[str, Any], int]] = [
    ("class defaults", {}, 10),
    ("modelscope", MODELSCOPE, 25),
    ("modelscope, trailing", {**MODELSCOPE, "timestep_spacing": "trailing"}, 7),
    ("modelscope, linspace", {**MODELSCOPE, "timestep_spacing": "linspace"}, 20),
    ("cosine v", {**COSINE_V, "timestep_spacing": "leading"}, 20),
    ("cosine v, trailing", {**COSINE_V, "timestep_spacing": "trailing"}, 16),
    ("cosine v, linspace", {**COSINE_V, "timestep_spacing": "linspace"}, 9),
    ("linear, sample", {"prediction_type": "sample", "clip_sample": False}, 12),
    ("sample, offset 3, trailing", {"prediction_type": "sample", "steps_offset": 3, "timestep_spacing": "trailing"}, 8),
    ("zero terminal SNR", {**ZERO_SNR, "timestep_spacing": "trailing"}, 10),
    ("zero terminal SNR, linspace", {**ZERO_SNR, "timestep_spacing": "linspace"}, 5),
    ("zero terminal SNR, leading epsilon", {**ZERO_SNR, "prediction_type": "epsilon"}, 10),
    ("two hundred training steps", {"num_train_timesteps": 200, "beta_end": 0.05, "steps_offset": 1}, 11),
    ("trained betas", {"num_train_timesteps": 50, "trained_betas": np.geomspace(1e-3, 0.2, 50).tolist()}, 6),
    ("one step", MODELSCOPE, 1),
    ("two steps", COSINE_V, 2),
]
OWN: list[tuple[str, str, dict[str, Any], int]] = [
    (DDIM, "clip range", {**COSINE_V, "clip_sample": True, "clip_sample_range": 0.7}, 10),
    (DDIM, "alpha to one", {**MODELSCOPE, "set_alpha_to_one": True}, 10),
    (DDIM, "cosine epsilon, clipped", {"beta_schedule": "squaredcos_cap_v2"}, 13),
    (DPM, "first order", {**MODELSCOPE, "solver_order": 1}, 9),
    (DPM, "heun", {**MODELSCOPE, "solver_type": "heun"}, 20),
    (DPM, "heun, short", {**COSINE_V, "solver_type": "heun"}, 8),
    (DPM, "no lower order at the end", {**MODELSCOPE, "lower_order_final": False}, 8),
    (DPM, "ends at sigma_min", {**MODELSCOPE, "final_sigmas_type": "sigma_min"}, 20),
    (DPM, "ends at sigma_min, short", {**MODELSCOPE, "final_sigmas_type": "sigma_min"}, 8),
    (
        DPM,
        "ends at sigma_min, second order throughout, heun",
        {**MODELSCOPE, "final_sigmas_type": "sigma_min", "lower_order_final": False, "solver_type": "heun"},
        8,
    ),
    (DPM, "Euler at the end", {**MODELSCOPE, "final_sigmas_type": "sigma_min", "euler_at_final": True}, 20),
    (DPM, "Karras", {**MODELSCOPE, "use_karras_sigmas": True}, 20),
    # Without bounds diffusers itself fails here: its first two timesteps are the same after rounding.
    (DPM, "Karras, cosine, bounds", {**COSINE_V, "use_karras_sigmas": True, "sigma_min": 0.02, "sigma_max": 20.0}, 12),
    (DPM, "clipped lambda", {**COSINE_V, "lambda_min_clipped": -5.1}, 16),
    (DPM, "clipped lambda, trailing", {**COSINE_V, "lambda_min_clipped": -5.1, "timestep_spacing": "trailing"}, 10),
    (
        DPM,
        "another solver's names",
        {**MODELSCOPE, "algorithm_type": "deis", "solver_type": "bh2", "final_sigmas_type": "sigma_min"},
        10,
    ),
    (EULER, "Karras", {**MODELSCOPE, "use_karras_sigmas": True}, 20),
    (EULER, "Karras with bounds", {**MODELSCOPE, "use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}, 9),
    (EULER, "log linear", {**MODELSCOPE, "interpolation_type": "log_linear"}, 10),
    (EULER, "ends at sigma_min", {**MODELSCOPE, "final_sigmas_type": "sigma_min"}, 10),
]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
ENDS_AT_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
OWN += [
    (UNIPC, "Karras", {**MODELSCOPE, "use_karras_sigmas": True}, 20),
    (UNIPC, "Karras with bounds", {**COSINE_V, "use_karras_sigmas": True, "sigma_min": 0.02, "sigma_max": 20.0}, 12),
    (UNIPC, "another solver's names", {**MODELSCOPE, "solver_type": "midpoint"}, 10),
    (UNIPC, "no corrector at two steps", {**MODELSCOPE, "disable_corrector": [0, 3]}, 8),
    (UNIPC, "no corrector at all", {**MODELSCOPE, "disable_corrector": list(range(8)), "solver_order": 3}, 8),
]
for order in (1, 2, 3):
    for kind in ("bh1", "bh2"):
        solver = {"solver_order": order, "solver_type": kind}
        OWN += [
            (UNIPC, f"order {order}, {kind}, {prediction}, sigma_min{', full order' * (not lower)}{', eps' * eps}", {
                **MODELSCOPE, **solver, **ENDS_AT_SIGMA_MIN, "prediction_type": prediction,
                "lower_order_final": lower, "predict_x0": not eps,
            }, 9)
            for prediction in ("epsilon", "v_prediction", "sample")
            for lower in (True, False)
            for eps in (True, False)
        ]  # fmt: skip
    solver = {"solver_order": order}
    OWN += [(UNIPC, f"order {order}, {n} steps", {**MODELSCOPE, **solver}, n) for n in (1, 2, 3, 5, 10, 25, 50)]
    OWN += [
        (UNIPC, f"flow, order {order}, shift {shift}, {n} steps", {**FLOW, **solver, "flow_shift": float(shift)}, n)
        for shift in (1, 3, 5, 8)
        for n in (1, 2, 3, 5, 10, 25, 50)
    ]
OWN += [
    (FLOW_EULER, f"shift {shift}, {n} steps", {"shift": float(shift)}, n)
    for shift in (1, 3, 5, 8)
    for n in (1, 2, 3, 5, 10, 25, 50)
]
CASES = [(name, config, steps, label) for label, config, steps in SHARED for name in (DDIM, DPM, EULER, UNIPC)]
CASES += [(name, config, steps, label) for name, label, config, steps in OWN]
CASES = [case for case in CASES if (case[0], case[3]) != (DDIM, "one step")] + [(DDIM, MODELSCOPE, 2, "two steps")]


def scheduler_of(name: str, config: dict[str, Any], steps: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(steps)
    return scheduler


def relative_error(ours: Any, theirs: Any, scale: float = 0.0) -> float:
    """Largest difference over the largest value of `theirs`, or over `scale` where that is larger."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), scale))


def initial_sigma(scheduler: Any) -> float:
    """Of a diffusers scheduler; flows start at unit noise and say nothing of it."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def model_input_of(scheduler: Any, x: Any, timestep: Any) -> Any:
    return scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x


def fake_denoiser(x: Any, timestep: Any, sin: Any) -> Any:
    return 0.9 * sin(1.3 * x + 0.01 * timestep) + 0.2 * x


def loop_of(sampler: Sampler, latents: np.ndarray) -> Any:
    return sample(sampler, lambda x, t: fake_denoiser(x, t, jnp.sin), jnp.asarray(latents))


def torch_loop_of(scheduler: Any, latents: np.ndarray) -> Any:
    x = torch.from_numpy(latents) * initial_sigma(scheduler)
    for timestep in scheduler.timesteps:
        prediction = fake_denoiser(model_input_of(scheduler, x, timestep), timestep, torch.sin)
        x = scheduler.step(prediction, timestep, x).prev_sample
    return x


def starts_at_huge_sigma(name: str, config: dict[str, Any], steps: int) -> bool:
    """Euler at (nearly) zero terminal SNR: samples of size 4096 and more, whose float32 rounding outweighs x_0's."""
    return make_sampler(config, steps, name=name).initial_sigma > 1000


@pytest.mark.parametrize(("name", "config", "steps", "label"), CASES, ids=[f"{c[0]}: {c[3]}" for c in CASES])
def test_every_step_equals_diffusers(name, config, steps, label):
    scheduler = scheduler_of(name, {"_class_name": name, **config}, steps)
    sampler = make_sampler({"_class_name": name, **config}, steps)
    np.testing.assert_allclose(sampler.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)
    assert sampler.initial_sigma == pytest.approx(initial_sigma(scheduler), rel=TOLERANCE)

    latents = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    theirs = torch.from_numpy(latents) * initial_sigma(scheduler)
    state = sampler.init(jnp.asarray(latents))
    for i, timestep in enumerate(scheduler.timesteps):
        model_input = model_input_of(scheduler, theirs, timestep)
        assert relative_error(sampler.model_input(state, i), model_input) <= TOLERANCE
        prediction = fake_denoiser(model_input, timestep, torch.sin)
        # A step that takes 20000 to 10 rounds at 20000's scale, in diffusers above all.
        scale = float(theirs.abs().max()) if starts_at_huge_sigma(name, config, steps) else 0.0
        theirs = scheduler.step(prediction, timestep, theirs).prev_sample
        state = sampler.step(state, i, jnp.asarray(prediction.numpy()))
        assert relative_error(state.sample, theirs, scale) <= TOLERANCE, f"step {i}"
        state = state._replace(sample=jnp.asarray(theirs.numpy()))


@pytest.mark.parametrize(("name", "config", "steps", "label"), CASES, ids=[f"{c[0]}: {c[3]}" for c in CASES])
def test_the_whole_loop_equals_diffusers(name, config, steps, label):
    scheduler = scheduler_of(name, {"_class_name": name, **config}, steps)
    sampler = make_sampler({"_class_name": name, **config}, steps)
    latents = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    ours, theirs = loop_of(sampler, latents), torch_loop_of(scheduler, latents)
    if starts_at_huge_sigma(name, config, steps):
        exact = euler_in_double_precision(scheduler, latents)
        assert relative_error(ours, exact) <= TOLERANCE
        assert relative_error(ours, exact) <= relative_error(theirs, exact)
    else:
        assert relative_error(ours, theirs) <= TOLERANCE


def euler_in_double_precision(scheduler: Any, latents: np.ndarray) -> np.ndarray:
    """Euler's method on v predictions, dx/dsigma = (x - x_0) / sigma, with the scheduler's sigmas."""
    assert scheduler.config.prediction_type == "v_prediction"
    sigmas = scheduler.sigmas.numpy().astype(np.float64)
    x = latents.astype(np.float64) * sigmas[0]
    for sigma, following, timestep in zip(sigmas[:-1], sigmas[1:], scheduler.timesteps.numpy(), strict=True):
        scale = 1 / np.sqrt(sigma**2 + 1)
        v = fake_denoiser(x * scale, float(timestep), np.sin)
        clean = x * scale**2 - sigma * scale * v
        x = x + (following - sigma) * (x - clean) / sigma
    return x


# A third of the cases, in which each class has each kind of first step.
LATER = [
    (*case[:3], (1, case[2] // 2, case[2] - 1)[i % 3], case[3])
    for i, case in enumerate([case for case in CASES if case[2] > 2][::3])
]


@pytest.mark.parametrize(
    ("name", "config", "steps", "first", "label"), LATER, ids=[f"{c[0]}: {c[4]}, from {c[3]}" for c in LATER]
)
def test_the_steps_from_a_later_one_on_equal_diffusers_from_an_image(name, config, steps, first, label):
    scheduler = scheduler_of(name, {"_class_name": name, **config}, steps)
    sampler = make_sampler({"_class_name": name, **config}, steps, first=first)
    if name != DDIM:  # which keeps no index
        scheduler.set_begin_index(first)
    rest = scheduler.timesteps[first:]
    np.testing.assert_allclose(sampler.timesteps, rest.numpy(), rtol=1e-6)
    clean, noise = np.random.default_rng(3).standard_normal((2, *SHAPE)).astype(np.float32)
    add_noise = getattr(scheduler, "scale_noise", None) or (lambda x, t, eps: scheduler.add_noise(x, eps, t))
    theirs = add_noise(torch.from_numpy(clean), rest[:1].repeat(len(clean)), torch.from_numpy(noise))
    start = sampler.noised(jnp.asarray(clean), jnp.asarray(noise))
    assert relative_error(start, theirs) <= TOLERANCE
    for timestep in rest:
        prediction = fake_denoiser(model_input_of(scheduler, theirs, timestep), timestep, torch.sin)
        theirs = scheduler.step(prediction, timestep, theirs).prev_sample
    ours = sample(sampler, lambda x, t: fake_denoiser(x, t, jnp.sin), start)
    assert relative_error(ours, theirs) <= TOLERANCE


def test_a_later_step_is_one_of_the_sampler_s():
    for first in (-1, 4):
        with pytest.raises(ValueError, match=r"first: .* must be one of the 4 steps"):
            make_sampler({"_class_name": DDIM}, 4, first=first)


@pytest.mark.parametrize("config", [MODELSCOPE, {**FLOW, "flow_shift": 3.0}], ids=["variance preserving", "flow"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_bh1_equals_diffusers_up_to_the_last_step_and_then_gives_the_clean_sample(config, order):
    config = {"_class_name": UNIPC, **config, "solver_order": order, "solver_type": "bh1"}
    scheduler, sampler = scheduler_of(UNIPC, config, 6), make_sampler(config, 6)
    theirs = torch.from_numpy(np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32))
    state = sampler.init(jnp.asarray(theirs.numpy()))
    for i, timestep in enumerate(scheduler.timesteps):
        prediction = fake_denoiser(theirs, timestep, torch.sin)
        clean = scheduler.convert_model_output(prediction, sample=theirs) if i == 5 else None
        theirs = scheduler.step(prediction, timestep, theirs).prev_sample
        state = sampler.step(state, i, jnp.asarray(prediction.numpy()))
        if i < 5:
            assert relative_error(state.sample, theirs) <= TOLERANCE, f"step {i}"
    # diffusers multiplies an infinite step by 0 there.
    assert not torch.isfinite(theirs).any()
    assert relative_error(state.sample, clean) <= TOLERANCE


def test_a_step_keeps_only_the_earlier_samples_that_it_reads():
    for order in (1, 2, 3):
        sampler = make_sampler({"_class_name": UNIPC, **FLOW, "solver_order": order}, 10)
        assert len(sampler.init(jnp.ones((1, 2))).previous_clean) == order
    plain = make_sampler({"_class_name": DDIM}, 10).init(jnp.ones((1, 2)))
    assert plain.previous_clean == () and plain.previous_sample is None


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("config", [MODELSCOPE, {**COSINE_V, "timestep_spacing": "trailing"}, ZERO_SNR, {}])
def test_ddim_with_eta_equals_diffusers_given_the_same_noise(eta, config):
    scheduler = scheduler_of(DDIM, config, 8)
    sampler = make_sampler(config, 8, name=DDIM, eta=eta)
    rng = np.random.default_rng(1)
    theirs = torch.from_numpy(rng.standard_normal(SHAPE).astype(np.float32))
    state = sampler.init(jnp.asarray(theirs.numpy()))
    for i, timestep in enumerate(scheduler.timesteps):
        prediction, noise = (torch.from_numpy(rng.standard_normal(SHAPE).astype(np.float32)) for _ in range(2))
        theirs = scheduler.step(prediction, timestep, theirs, eta=eta, variance_noise=noise).prev_sample
        state = sampler.advance(state, i, jnp.asarray(prediction.numpy()), jnp.asarray(noise.numpy()))
        assert relative_error(state.sample, theirs) <= TOLERANCE
        state = state._replace(sample=jnp.asarray(theirs.numpy()))


@pytest.mark.parametrize("origin", [DDIM, DPM, EULER, "PNDMScheduler", UNIPC])
@pytest.mark.parametrize("target", [DDIM, DPM, EULER, UNIPC])
def test_another_sampler_is_what_from_config_makes(origin, target):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(diffusers, origin)(beta_schedule="scaled_linear", beta_end=0.012, steps_offset=1)
        in_memory = dict(made.config)  # knows which fields were left to the class's defaults
        on_disk = json.loads(made.to_json_string())  # does not: defaults have become choices
    for config in (in_memory, on_disk):
        theirs = scheduler_of(target, config, 6)
        ours = make_sampler({"_class_name": origin, **config}, 6, name=target)
        np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=1e-6)
        latents = np.random.default_rng(2).standard_normal(SHAPE).astype(np.float32)
        assert relative_error(loop_of(ours, latents), torch_loop_of(theirs, latents)) <= TOLERANCE


def test_the_flow_samplers_are_each_what_from_config_makes_of_the_other_where_that_is_a_flow():
    config = dict(diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=3.0).config)
    theirs = scheduler_of(FLOW_EULER, config, 6)
    ours = make_sampler({"_class_name": UNIPC, **config}, 6, name=FLOW_EULER)
    np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=1e-6)
    config = dict(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    with pytest.raises(UserError, match=f"sampler: {UNIPC} does not fit: .* choose {FLOW_EULER}"):
        make_sampler({"_class_name": FLOW_EULER, **config}, 6, name=UNIPC)


def test_fresh_noise_of_a_sample_does_not_depend_on_its_batch():
    sampler = make_sampler({**MODELSCOPE, "_class_name": DDIM}, 4, eta=1.0)
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    latents = jax.random.normal(jax.random.key(0), (3, 4, 2))
    together = sample(sampler, lambda x, t: 0.1 * x, latents, keys)
    alone = sample(sampler, lambda x, t: 0.1 * x, latents[2:], keys[2:])
    np.testing.assert_array_equal(together[2:], alone)
    assert not np.allclose(together[0], together[1])


def test_a_stochastic_sampler_without_a_key_raises():
    sampler = make_sampler({**MODELSCOPE, "_class_name": DDIM}, 4, eta=0.5)
    with pytest.raises(ValueError, match="key"):
        sample(sampler, lambda x, t: x, jnp.ones((1, 2)))


def test_the_loop_compiles_once_for_all_its_steps():
    traces = []

    def denoise(x, t):
        traces.append(t)
        return 0.1 * x

    run = jax.jit(lambda x: sample(make_sampler({"_class_name": DPM}, 30), denoise, x))
    run(jnp.ones((2, 3)))
    assert len(traces) == 1


@pytest.mark.parametrize("name", [DDIM, DPM, EULER, UNIPC])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_denoiser_that_knows_the_answer_is_followed_to_it(name, spacing):
    config = {**COSINE_V, "prediction_type": "sample", "timestep_spacing": spacing, "set_alpha_to_one": True}
    truth = jax.random.normal(jax.random.key(3), (2, 5))
    result = sample(make_sampler(config, 8, name=name), lambda x, t: truth, jnp.ones((2, 5)))
    np.testing.assert_allclose(result, truth, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_on_the_scaled_schedule_is_lvdms(eta):
    """p_sample_ddim of lvdm with use_scale, in torch, on an epsilon that depends on the sample."""
    config = {
        "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "use_scale": True, "scale_b": 0.7,
    }  # fmt: skip
    steps = 5
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    scale = torch.cat([torch.linspace(1, 0.7, 400, dtype=torch.float64), torch.full((600,), 0.7, dtype=torch.float64)])
    visited = torch.arange(0, 1000, 1000 // steps) + 1
    before = torch.cat([torch.zeros(1, dtype=torch.long), visited[:-1]])
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((2, 3, 2, 2, 4)))
    fresh = rng.standard_normal((steps, *x.shape))
    sampler = make_sampler(config, steps, eta=eta)
    state = sampler.init(jnp.asarray(x.numpy(), jnp.float32))
    assert sampler.timesteps.tolist() == visited.flip(0).tolist()
    for i in range(steps):
        now, last = visited[steps - 1 - i], before[steps - 1 - i]
        predict = lambda y: 0.3 * y + 0.1  # noqa: E731
        noise = predict(x)
        sigma = eta * ((1 - abar[last]) / (1 - abar[now]) * (1 - abar[now] / abar[last])).sqrt()
        clean = (x - (1 - abar[now]).sqrt() * noise) / abar[now].sqrt() / scale[now]
        x = abar[last].sqrt() * scale[last] * clean + (1 - abar[last] - sigma**2).sqrt() * noise
        x = x + sigma * torch.from_numpy(fresh[i])
        drawn = jnp.asarray(fresh[i], jnp.float32) if eta else None
        state = sampler.advance(state, i, predict(sampler.model_input(state, i)), drawn)
    # float32 against float64; the last bits are amplified by 1 / signal at the first step.
    np.testing.assert_allclose(state.sample, x, rtol=1e-4, atol=1e-4)
