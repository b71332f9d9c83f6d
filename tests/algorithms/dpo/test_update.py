"""One update: what a group shares, what is exact at theta = phi, and what leaves the state alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.algorithms.dpo.building import (
    EMPTY,
    SHAPE,
    apply,
    build,
    constants,
    form,
    groups_like,
    levels,
    mean,
    pair_constants,
    policy_of,
    unet3d,
    with_buffer,
)
from vpo_jax.algorithms.dpo import losses
from vpo_jax.algorithms.dpo.algorithm import make_loss
from vpo_jax.algorithms.dpo.selection import PAIRS
from vpo_jax.algorithms.dpo.update import make_draw, make_errors, make_gradients, make_weigh
from vpo_jax.families.protocol import Text
from vpo_jax.runtime.keys import stream_key

LN2 = np.float32(np.log(2.0))


# ---- What is shared inside a group ----


@pytest.mark.parametrize("size", [2, 4])
def test_the_candidates_of_a_group_share_noise_and_timestep(pipeline, size):
    groups = groups_like(size=size)
    noised = make_draw(pipeline.process, 0, 2)(groups, EMPTY, 0, 1)
    timesteps = np.asarray(noised.timesteps).reshape(4, size)
    assert (timesteps == timesteps[:, :1]).all()
    signal, sigma = levels(pipeline, timesteps)
    noise = np.asarray((noised.latents.reshape(groups.latents.shape) - signal * groups.latents) / sigma)
    for k in range(1, size):
        # The noise comes back through a subtraction; small sigmas amplify float32's rounding.
        np.testing.assert_allclose(noise[:, 0], noise[:, k], atol=2e-4)
    assert len(np.unique(timesteps)) > 1
    assert not np.allclose(noise[0], noise[1])


@pytest.mark.parametrize("size", [2, 4])
def test_caption_dropout_falls_on_the_candidates_of_a_group_alike(pipeline, size):
    groups = groups_like((True,) * 64, size=size)
    noised = make_draw(pipeline.process, 0, 2, 0.5)(groups, EMPTY, 0, 0)
    text = np.asarray(noised.text.hidden).reshape(64, size, 6, 8)
    dropped = (text[:, 0] == 0).all(axis=(1, 2))
    assert 10 < dropped.sum() < 54
    seen = []

    def denoise(frozen, trainable, latents, timesteps, text):
        seen.append((text, timesteps))
        return latents

    with jax.disable_jit():
        make_errors(denoise)({}, {}, noised)
    (text, timesteps) = seen[0]
    for k in range(1, size):
        np.testing.assert_array_equal(text.hidden[0::size], text.hidden[k::size])
        np.testing.assert_array_equal(timesteps[0::size], timesteps[k::size])


def test_groups_are_noised_within_the_share_of_the_schedule_that_is_given(pipeline):
    groups, process = groups_like((True,) * 64), pipeline.process
    number = process.num_train_timesteps
    drawn = make_draw(process, 0, 2, share=(0.25, 0.5))(groups, EMPTY, 0, 0).timesteps
    assert drawn.min() >= 0.25 * number and drawn.max() < 0.5 * number and len(np.unique(drawn)) > 10
    whole = make_draw(process, 0, 2)(groups, EMPTY, 0, 0).timesteps
    assert whole.min() < 0.25 * number and whole.max() >= 0.5 * number
    for low, only in ((0.5, round(0.5 * number)), (1.0 - 1e-9, number - 1)):
        one = make_draw(process, 0, 2, share=(low, low + 1e-9))(groups, EMPTY, 0, 0).timesteps
        np.testing.assert_array_equal(one, only)


@pytest.mark.parametrize("size", [2, 3])
def test_a_groups_noise_depends_on_its_own_slot_and_time_and_on_nothing_else(pipeline, size):
    groups, draw = groups_like(size=size), make_draw(pipeline.process, 0, 2)
    whole = draw(groups, EMPTY, 3, 1)
    part = draw(jax.tree.map(lambda x: x[2:], groups), EMPTY, 3, 1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2 * size :], b), whole, part)
    fresh = [draw(groups, EMPTY, step, update).latents[::size] for step in (0, 1, 2) for update in (0, 1)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(fresh) for b in fresh[:i])


def test_an_old_and_a_new_group_of_one_slot_meet_different_noise(pipeline):
    old, new = groups_like(step=4), groups_like(step=5)
    draw = make_draw(pipeline.process, 0, 2)
    assert not np.array_equal(draw(old, EMPTY, 5, 0).latents, draw(new, EMPTY, 5, 0).latents)


def test_noised_videos_are_what_the_schedule_says(pipeline):
    groups = groups_like()
    noised = make_draw(pipeline.process, 5, 2)(groups, EMPTY, 0, 0)
    at_time, at_noise = jax.random.split(stream_key(5, "noise", 0, 2, 0))
    t = int(jax.random.randint(at_time, (), 0, 100))
    eps = jax.random.normal(at_noise, SHAPE)
    assert int(noised.timesteps[2 * 2]) == t
    signal, sigma = levels(pipeline, t)
    winner, loser = groups.latents[2]
    np.testing.assert_allclose(noised.latents[2 * 2], signal * winner + sigma * eps, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(noised.target[2 * 2 + 1], signal * eps - sigma * loser, rtol=1e-5, atol=1e-6)


# ---- Exactness ----


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 0], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [2, 4])
def test_at_phi_equal_theta_u_is_exactly_0_and_the_loss_exactly_ln_2(configure, pipeline_of, rank, dtype, size):
    options = {"lora__rank": rank, "model__dtype": dtype, "preference__beta": 5000.0}
    groups = groups_like(size=size)
    built = build(configure(**options), pipeline_of(unet3d()), groups)
    dpo, frozen = built.dpo, built.frozen.backbone
    # Random adapters: fresh ones are zero and would hide a path that differs.
    moved = jax.tree.map(lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), built.policy.initial)
    noised = dpo.draw(groups, EMPTY, 0, 0)
    theta = dpo.errors(frozen, moved, noised)[0]
    phi = dpo.errors(frozen, jax.tree.map(jnp.array, moved), noised)[0]
    np.testing.assert_array_equal(np.abs(theta - phi), 0.0)
    for pairs in PAIRS:
        loss_of = make_loss(form(configure, pairs, **options).preference)
        found = loss_of((theta - phi).reshape(4, size), groups.rewards, groups.preferred, groups.learnt)
        np.testing.assert_array_equal(np.abs(found.logit), 0.0)
        weighed, metrics = make_weigh(loss_of)(groups, theta, phi, None)
        # Of n candidates the listwise loss is ln n, as float32's logarithm rounds it.
        expected = np.float32(jnp.log(jnp.float32(size))) if pairs == "listwise" else LN2
        assert np.float32(weighed.loss) == expected, pairs
        assert mean(metrics, "loss/implicit_accuracy") == 0.5, pairs


@pytest.mark.parametrize(("pairs", "size"), [("best_worst", 2), ("all", 4), ("group", 4), ("listwise", 4)])
def test_a_loss_in_one_program_with_the_reference_would_not_be_exact_but_the_gradient_is_its_gradient(
    configure, pipeline, pairs, size
):
    config, groups = form(configure, pairs, preference__beta=50.0), groups_like(size=size)
    built = build(config, pipeline, groups)
    policy, frozen = built.policy, built.frozen.backbone
    moved = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), policy.initial)
    noised = built.dpo.draw(groups, EMPTY, 0, 0)
    phi = built.dpo.errors(frozen, policy.initial, noised)[0]
    weighed, _ = built.dpo.weigh(groups, built.dpo.errors(frozen, moved, noised)[0], phi, None)
    split, _ = jax.jit(make_gradients(policy.denoise))(frozen, moved, None, noised, weighed)
    loss_of = make_loss(config.preference)

    def direct(trainable):
        predictions = policy.denoise(frozen, trainable, noised.latents, noised.timesteps, noised.text)
        change = (losses.squared_error(predictions, noised.target) - phi).reshape(4, size)
        if pairs == "best_worst":
            return jnp.mean(losses.preference_loss(-25.0 * (change[:, 0] - change[:, 1])))
        return jnp.mean(loss_of(change, groups.rewards, groups.preferred, groups.learnt).loss)

    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(jax.jit(jax.grad(direct))(moved)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(optax.global_norm(split)))


def test_adapters_folded_into_kernels_predict_and_learn_the_same(configure, pipeline):
    """Float32: two orders of summation, to 1e-5 of the scale."""
    found = []
    for merge in (False, True):
        policy = policy_of(configure(lora__merge=merge), pipeline)
        adapters = jax.tree.map(lambda x: x + 0.05, policy.initial)
        latents = jax.random.normal(jax.random.key(0), (2, 4, 4, 4, 4))
        text = Text(jax.random.normal(jax.random.key(1), (2, 6, 8)))

        def loss(adapters, policy=policy, latents=latents, text=text):
            prediction = policy.denoise(policy.frozen, adapters, latents, jnp.array([3, 70]), text)
            return jnp.sum(prediction**2), prediction

        (_, prediction), gradient = jax.value_and_grad(loss, has_aux=True)(adapters)
        found.append({"prediction": prediction, "gradient": gradient})
        start = policy.denoise(policy.frozen, policy.initial, latents, jnp.array([3, 70]), text)
        assert np.abs(prediction - start).max() > 0.01, "the adapters do something"
    for plain, folded in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(folded, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())


def test_errors_of_theta_and_phi_come_from_one_compiled_program(configure, pipeline):
    built = build(configure(), pipeline, groups_like())
    state = built.state
    for number in range(3):
        state, _ = apply(built, state, number)
    assert built.dpo.errors._cache_size() == 1
    assert built.dpo.descend._cache_size() == 1


# ---- Accumulation, masks, options ----


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("anchor", [0.0, 0.3])
def test_accumulated_gradients_are_the_whole_batchs_with_one_global_denominator(configure, pipeline, size, anchor):
    mask = jnp.array((True, False, True, True, False, True, True, False))
    groups = groups_like(tuple(mask.tolist()), size=size)
    built = build(configure(lora__rank=0), pipeline, groups)
    frozen, initial = built.frozen.backbone, built.policy.initial
    moved = jax.tree.map(lambda x: x * 1.05, initial)
    noised = built.dpo.draw(groups, EMPTY, 0, 0)
    weighed = pair_constants(jnp.linspace(1, 2, 8), jnp.linspace(2, 1, 8), mask)
    if size > 2:
        weighed = constants(np.random.default_rng(1).normal(size=(8, size)), mask)
    _, first = built.dpo.errors(frozen, initial, noised)
    found = []
    # Videos at a time: whole groups, and microbatches that split them.
    for microbatch in (0, 8, 4, 2) if size == 2 else (0, 16, 8, 4, 2, 1):
        gradients = jax.jit(make_gradients(built.policy.denoise, microbatch, anchor))
        found.append(gradients(frozen, moved, first, noised, weighed))
    scale = float(optax.global_norm(found[0][0]))
    for gradient, metrics in found[1:]:
        # Sums in another order: float32 rounding of the gradient's size.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * scale), gradient, found[0][0])
        assert set(metrics) == ({"loss/anchor"} if anchor else set())
        for name in metrics:
            np.testing.assert_allclose(metrics[name], found[0][1][name], rtol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_errors_in_microbatches_are_the_whole_batchs(configure, pipeline, size):
    groups = groups_like((True,) * 6, size=size)
    built = build(configure(), pipeline, groups)
    noised = built.dpo.draw(groups, EMPTY, 0, 0)
    whole = built.dpo.errors(built.frozen.backbone, built.policy.initial, noised)
    for microbatch in (4, 3):
        parts = make_errors(built.policy.denoise, microbatch)(built.frozen.backbone, built.policy.initial, noised)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, parts)


@pytest.mark.parametrize("pairs", ["best_worst", "group"])
def test_a_dropped_prompt_has_no_influence(configure, pipeline, pairs):
    groups = groups_like((True, True, False, True), size=2 if pairs == "best_worst" else 4)
    built = build(form(configure, pairs, preference__anchor=0.5), pipeline, groups)
    other = groups._replace(latents=groups.latents.at[2, 0].set(99.0), rewards=groups.rewards.at[2, 0].set(-7.0))
    first, _ = apply(built)
    second, _ = apply(built, with_buffer(built.state, other))
    jax.tree.map(np.testing.assert_array_equal, first.policy, second.policy)


@pytest.mark.parametrize("pairs", ["all", "group", "listwise"])
def test_a_dropped_candidate_has_no_influence_on_its_group(configure, pipeline, pairs):
    groups = groups_like(size=4)
    learnt = groups.learnt.at[2, 1].set(False)
    groups = groups._replace(learnt=learnt, preferred=groups.preferred & learnt[:, :, None] & learnt[:, None, :])
    built = build(form(configure, pairs, preference__anchor=0.5, preference__winner_penalty=1.0), pipeline, groups)
    state = built.state._replace(reference=jax.tree.map(lambda x: x + 0.05, built.state.reference))
    first, metrics = apply(built, state)
    assert mean(metrics, "loss/applied") == 1.0
    second, _ = apply(built, with_buffer(state, groups._replace(latents=groups.latents.at[2, 1].set(99.0))))
    jax.tree.map(np.testing.assert_array_equal, first.policy, second.policy)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_with_no_surviving_pair_parameters_moments_and_count_stay_bitwise(configure, pipeline, decay):
    config = configure(ema__decay=decay, optimizer__weight_decay=0.1)
    built = build(config, pipeline, groups_like())
    state, _ = apply(built)
    buffer = state.algorithm.buffer
    after, metrics = apply(built, with_buffer(state, buffer._replace(mask=jnp.zeros(4, bool))), 1)
    for name in ("policy", "optimizer", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    assert bool(after.finite)
    assert mean(metrics, "loss/applied") == 0.0 and mean(metrics, "loss/non_finite") == 0.0
    moving, _ = apply(built, state, 1)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(moving.policy), jax.tree.leaves(state.policy), strict=True)
    )


def test_groups_that_are_too_old_do_not_train(configure, pipeline):
    built = build(configure(), pipeline, groups_like(step=0))
    later, metrics = apply(built, built.state._replace(step=jnp.int32(1)))
    jax.tree.map(np.testing.assert_array_equal, later.policy, built.state.policy)
    assert float(metrics["loss/preference"][1]) == 0.0


def test_a_non_finite_loss_keeps_the_old_state_and_stops_every_later_update(configure, pipeline):
    built = build(configure(), pipeline, groups_like())
    state = built.state
    buffer = state.algorithm.buffer
    broken = with_buffer(state, buffer._replace(latents=buffer.latents.at[1, 0].set(jnp.inf)))
    after, metrics = apply(built, broken)
    assert not bool(after.finite) and mean(metrics, "loss/non_finite") == 1.0
    for name in ("policy", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    healed, metrics = apply(built, with_buffer(after, buffer), 1)
    jax.tree.map(np.testing.assert_array_equal, healed.policy, state.policy)
    assert not bool(healed.finite) and mean(metrics, "loss/applied") == 0.0


def test_a_non_finite_gradient_of_a_finite_loss_keeps_the_old_state(configure, pipeline):
    config = configure()
    policy = dataclasses.replace(policy_of(config, pipeline))

    @jax.custom_vjp
    def spoil(x):
        return x

    spoil.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.nan,))

    def denoise(frozen, trainable, *inputs):
        return spoil(policy.denoise(frozen, trainable, *inputs))

    built = build(config, pipeline, groups_like(), denoise)
    after, metrics = apply(built)
    assert np.isfinite(mean(metrics, "loss/preference")) and not bool(after.finite)
    jax.tree.map(np.testing.assert_array_equal, after.policy, built.state.policy)


@pytest.mark.parametrize(
    ("pairs", "size", "updates"), [("best_worst", 2, 30), ("group", 4, 30), ("all", 4, 70), ("listwise", 4, 70)]
)
def test_updates_lower_the_winners_error_against_the_losers(configure, pipeline, pairs, size, updates):
    """All six pairs of a group and the ranking of four take longer to learn than the best against the worst."""
    overrides = {"preference__beta": 100.0, "optimizer__learning_rate": 5e-3, "lora__rank": 0}
    built = build(form(configure, pairs, **overrides), pipeline, groups_like(size=size))
    state, accuracy = built.state, []
    for number in range(updates):
        state, metrics = apply(built, state, number)
        accuracy.append(mean(metrics, "loss/implicit_accuracy"))
    assert accuracy[0] == 0.5 and np.mean(accuracy[-10:]) > 0.9
    assert float(state.curriculum.pairs) == 4.0 * updates
