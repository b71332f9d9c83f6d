"""One update: what is shared inside a pair, what is exact at theta = phi, and what leaves the state alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from vpo_jax.training.pairs import Pairs
from vpo_jax.training.state import init_state
from vpo_jax.training.step import (
    Noised,
    Update,
    make_draw,
    make_errors,
    make_gradients,
    predict_pairs,
)

from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig
from vpo_jax.runtime.keys import stream_key
from vpo_jax.training import losses
from vpo_jax.training.optimizer import make_optimizer
from vpo_jax.training.policy import make_policy

LN2 = np.float32(np.log(2.0))


def pairs_like(mask=(True,) * 4, step=0, shape=(4, 4, 4, 4), seed=0):
    rng = np.random.default_rng(seed)
    n = len(mask)
    winner, loser = rng.normal(size=(2, n, *shape)).astype(np.float32)
    return Pairs(
        winner=jnp.asarray(winner),
        loser=jnp.asarray(loser),
        text=jnp.asarray(rng.normal(size=(n, 6, 8)), jnp.float32),
        mask=jnp.asarray(mask),
        winner_reward=jnp.linspace(1.0, 2.0, n),
        loser_reward=-jnp.ones(n),
        slot=jnp.arange(n, dtype=jnp.int32),
        step=jnp.full(n, step, jnp.int32),
    )


def build(config, pipeline, pairs):
    policy = make_policy(config, pipeline.unet, pipeline.params["unet"])
    optimizer = make_optimizer(config.optimizer)
    state = init_state(policy.start, optimizer, pairs, 2, with_ema=config.ema.decay > 0)
    state = state._replace(buffer=pairs, watched=pairs)
    update = Update(config, policy.denoise, policy.in_float32().denoise, pipeline.schedule, optimizer)
    return policy, state, update


def apply(policy, state, update, number=0):
    # A donated buffer must not be one that the test still reads.
    state = jax.tree.map(lambda x: jnp.array(x, copy=True), state)
    return update(state, policy.frozen, policy.start, jnp.zeros((6, 8)), number)


def mean(metrics, name):
    return float(metrics[name][0] / metrics[name][1])


def unet3d():
    config = UNet3DConfig.from_dict(
        {
            "block_out_channels": [8],
            "down_block_types": ["CrossAttnDownBlock3D"],
            "up_block_types": ["CrossAttnUpBlock3D"],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
        }
    )
    return UNet3DConditionModel(config)


# ---- What is shared inside a pair ----


def test_winner_and_loser_share_noise_and_timestep(pipeline):
    pairs, schedule = pairs_like(), pipeline.schedule
    noised = make_draw(schedule, 0, 2)(pairs, jnp.zeros((6, 8)), 0, 1)
    signal = schedule.signal[np.asarray(noised.timesteps)][:, None, None, None, None]
    sigma = schedule.noise[np.asarray(noised.timesteps)][:, None, None, None, None]
    of_winner = (noised.winner - signal * pairs.winner) / sigma
    of_loser = (noised.loser - signal * pairs.loser) / sigma
    # The noise comes back through a subtraction; small sigmas amplify float32's rounding.
    np.testing.assert_allclose(of_winner, of_loser, atol=2e-4)
    assert len(np.unique(np.asarray(noised.timesteps))) > 1
    assert not np.allclose(of_winner[0], of_winner[1])


def test_caption_dropout_falls_on_winner_and_loser_alike(pipeline):
    pairs = pairs_like((True,) * 64)
    noised = make_draw(pipeline.schedule, 0, 2, 0.5)(pairs, jnp.zeros((6, 8)), 0, 0)
    dropped = np.asarray((noised.text == 0).all(axis=(1, 2)))
    assert 10 < dropped.sum() < 54
    seen = []

    def denoise(frozen, adapters, latents, timesteps, text):
        seen.append((text, timesteps))
        return latents

    predict_pairs(denoise, {}, {}, noised)
    (text, timesteps) = seen[0]
    np.testing.assert_array_equal(text[0::2], text[1::2])
    np.testing.assert_array_equal(timesteps[0::2], timesteps[1::2])


def test_pairs_are_noised_within_the_share_of_the_schedule_that_is_given(pipeline):
    pairs, empty = pairs_like((True,) * 64), jnp.zeros((6, 8))
    number = pipeline.schedule.num_train_timesteps
    drawn = make_draw(pipeline.schedule, 0, 2, timesteps=(0.25, 0.5))(pairs, empty, 0, 0).timesteps
    assert drawn.min() >= 0.25 * number and drawn.max() < 0.5 * number and len(np.unique(drawn)) > 10
    whole = make_draw(pipeline.schedule, 0, 2)(pairs, empty, 0, 0).timesteps
    assert whole.min() < 0.25 * number and whole.max() >= 0.5 * number
    for low, only in ((0.5, round(0.5 * number)), (1.0 - 1e-9, number - 1)):
        one = make_draw(pipeline.schedule, 0, 2, timesteps=(low, low + 1e-9))(pairs, empty, 0, 0).timesteps
        np.testing.assert_array_equal(one, only)


def test_a_pairs_noise_depends_on_its_own_slot_and_time_and_on_nothing_else(pipeline):
    pairs = pairs_like()
    draw = make_draw(pipeline.schedule, 0, 2)
    empty = jnp.zeros((6, 8))
    whole = draw(pairs, empty, 3, 1)
    part = draw(jax.tree.map(lambda x: x[2:], pairs), empty, 3, 1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2:], b), whole, part)
    fresh = [draw(pairs, empty, step, update).winner for step in (0, 1, 2) for update in (0, 1)]
    assert all(not np.array_equal(a, b) for i, a in enumerate(fresh) for b in fresh[:i])


def test_an_old_and_a_new_pair_of_one_slot_meet_different_noise(pipeline):
    old, new = pairs_like(step=4), pairs_like(step=5)
    draw = make_draw(pipeline.schedule, 0, 2)
    empty = jnp.zeros((6, 8))
    assert not np.array_equal(draw(old, empty, 5, 0).winner, draw(new, empty, 5, 0).winner)


# ---- Exactness ----


@pytest.mark.parametrize("rank", [2, 0], ids=["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_phi_equal_theta_u_is_exactly_0_and_the_loss_exactly_ln_2(configure, pipeline_of, rank, dtype):
    config = configure(lora__rank=rank, model__dtype=dtype, preference__beta=5000.0)
    pipeline = pipeline_of(unet3d())
    policy, state, update = build(config, pipeline, pairs_like())
    # Random adapters: fresh ones are zero and would hide a path that differs.
    moved = jax.tree.map(lambda x: x + 0.05 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), policy.start)
    state = state._replace(policy=moved, reference=moved)
    noised = update.draw(state.buffer, jnp.zeros((6, 8)), 0, 0)
    theta = update.errors(policy.frozen, state.policy, noised)[0]
    phi = update.errors(policy.frozen, jax.tree.map(jnp.array, state.reference), noised)[0]
    logit = losses.preference_logit(theta, phi, 5000.0)
    np.testing.assert_array_equal(np.abs(logit), 0.0)
    _, loss, metrics = update.weigh(state.buffer, theta, phi)
    assert np.float32(loss) == LN2
    assert mean(metrics, "loss/implicit_accuracy") == 0.5


def test_a_loss_in_one_program_with_the_reference_would_not_be_exact_but_the_gradient_is_its_gradient(
    configure, pipeline
):
    config = configure(preference__beta=50.0)
    policy, state, update = build(config, pipeline, pairs_like())
    moved = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), policy.start)
    noised = update.draw(state.buffer, jnp.zeros((6, 8)), 0, 0)
    phi = update.errors(policy.frozen, policy.start, noised)[0]
    coefficients, _, _ = update.weigh(state.buffer, update.errors(policy.frozen, moved, noised)[0], phi)
    split, _ = jax.jit(make_gradients(policy.denoise))(
        policy.frozen, moved, None, noised, coefficients, state.buffer.mask
    )

    def direct(adapters):
        winner, loser = predict_pairs(policy.denoise, policy.frozen, adapters, noised)
        theta = losses.PairErrors(
            losses.squared_error(winner, noised.winner_target), losses.squared_error(loser, noised.loser_target)
        )
        return jnp.mean(losses.preference_loss(losses.preference_logit(theta, phi, 50.0), jnp.ones(4)))

    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(jax.jit(jax.grad(direct))(moved)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(optax.global_norm(split)))


def test_adapters_folded_into_kernels_predict_and_learn_the_same(configure, pipeline):
    """Float32: two orders of summation, to 1e-5 of the scale."""
    found = []
    for fold in (False, True):
        policy = make_policy(configure(lora__fold=fold), pipeline.unet, pipeline.params["unet"])
        adapters = jax.tree.map(lambda x: x + 0.05, policy.start)
        latents = jax.random.normal(jax.random.key(0), (2, 4, 4, 4, 4))
        text = jax.random.normal(jax.random.key(1), (2, 6, 8))

        def loss(adapters, policy=policy, latents=latents, text=text):
            prediction = policy.denoise(policy.frozen, adapters, latents, jnp.array([3, 70]), text)
            return jnp.sum(prediction**2), prediction

        (_, prediction), gradient = jax.value_and_grad(loss, has_aux=True)(adapters)
        found.append({"prediction": prediction, "gradient": gradient})
        start = policy.denoise(policy.frozen, policy.start, latents, jnp.array([3, 70]), text)
        assert np.abs(prediction - start).max() > 0.01, "the adapters do something"
    for plain, folded in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(folded, plain, rtol=1e-5, atol=1e-5 * np.abs(plain).max())


def test_errors_of_theta_and_phi_come_from_one_compiled_program(configure, pipeline):
    policy, state, update = build(configure(), pipeline, pairs_like())
    for number in range(3):
        state, _ = apply(policy, state, update, number)
    assert update.errors._cache_size() == 1
    assert update.descend._cache_size() == 1


# ---- Accumulation, masks, options ----


@pytest.mark.parametrize("options", [{}, {"safeguard_mu": 0.9, "anchor": 0.3}])
def test_accumulated_gradients_are_the_whole_batchs_with_one_global_denominator(configure, pipeline, options):
    config = configure(lora__rank=0)
    pairs = pairs_like((True, False, True, True, False, True, True, False))
    policy, _state, update = build(config, pipeline, pairs)
    moved = jax.tree.map(lambda x: x * 1.05, policy.start)
    noised = update.draw(pairs, jnp.zeros((6, 8)), 0, 0)
    coefficients = losses.PairCoefficients(jnp.linspace(1, 2, 8), jnp.linspace(2, 1, 8))
    _, first = update.errors(policy.frozen, policy.start, noised)
    found = []
    for microbatch in (0, 4, 2, 1):
        gradients = jax.jit(make_gradients(policy.denoise, microbatch, **options))
        found.append(gradients(policy.frozen, moved, first, noised, coefficients, pairs.mask))
    scale = float(optax.global_norm(found[0][0]))
    for gradient, metrics in found[1:]:
        # Sums in another order: float32 rounding of the gradient's size.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * scale), gradient, found[0][0])
        for name in metrics:
            np.testing.assert_allclose(metrics[name], found[0][1][name], rtol=1e-5)


def test_errors_in_microbatches_are_the_whole_batchs(configure, pipeline):
    pairs = pairs_like((True,) * 6)
    policy, _, update = build(configure(), pipeline, pairs)
    noised = update.draw(pairs, jnp.zeros((6, 8)), 0, 0)
    whole = update.errors(policy.frozen, policy.start, noised)
    parts = make_errors(policy.denoise, 2)(policy.frozen, policy.start, noised)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, parts)


def test_a_dropped_pair_has_no_influence(configure, pipeline):
    config = configure()
    pairs = pairs_like((True, True, False, True))
    policy, state, update = build(config, pipeline, pairs)
    other = pairs._replace(winner=pairs.winner.at[2].set(99.0), winner_reward=pairs.winner_reward.at[2].set(-7.0))
    first, _ = apply(policy, state, update)
    second, _ = apply(policy, state._replace(buffer=other), update)
    jax.tree.map(np.testing.assert_array_equal, first.policy, second.policy)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_with_no_surviving_pair_parameters_moments_and_count_stay_bitwise(configure, pipeline, decay):
    config = configure(ema__decay=decay, optimizer__weight_decay=0.1)
    policy, state, update = build(config, pipeline, pairs_like())
    state, _ = apply(policy, state, update)
    dropped = state._replace(buffer=state.buffer._replace(mask=jnp.zeros(4, bool)))
    after, metrics = apply(policy, dropped, update, 1)
    for name in ("policy", "optimizer", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    assert bool(after.finite)
    assert mean(metrics, "loss/applied") == 0.0 and mean(metrics, "loss/non_finite") == 0.0
    moving, _ = apply(policy, state, update, 1)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(moving.policy), jax.tree.leaves(state.policy), strict=True)
    )


def test_pairs_that_are_too_old_do_not_train(configure, pipeline):
    policy, state, update = build(configure(), pipeline, pairs_like(step=0))
    later, metrics = apply(policy, state._replace(step=jnp.int32(1)), update)
    jax.tree.map(np.testing.assert_array_equal, later.policy, state.policy)
    assert float(metrics["loss/preference"][1]) == 0.0


def test_a_non_finite_loss_keeps_the_old_state_and_stops_every_later_update(configure, pipeline):
    policy, state, update = build(configure(), pipeline, pairs_like())
    broken = state._replace(buffer=state.buffer._replace(winner=state.buffer.winner.at[1].set(jnp.inf)))
    after, metrics = apply(policy, broken, update)
    assert not bool(after.finite) and mean(metrics, "loss/non_finite") == 1.0
    for name in ("policy", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    healed, metrics = apply(policy, after._replace(buffer=state.buffer), update, 1)
    jax.tree.map(np.testing.assert_array_equal, healed.policy, state.policy)
    assert not bool(healed.finite) and mean(metrics, "loss/applied") == 0.0


def test_a_non_finite_gradient_of_a_finite_loss_keeps_the_old_state(configure, pipeline):
    config = configure()
    policy, state, update = build(config, pipeline, pairs_like())
    nan = dataclasses.replace(policy)

    @jax.custom_vjp
    def spoil(x):
        return x

    spoil.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.nan,))

    def denoise(frozen, adapters, *inputs):
        return spoil(nan.denoise(frozen, adapters, *inputs))

    update = Update(config, denoise, denoise, pipeline.schedule, make_optimizer(config.optimizer))
    after, metrics = apply(policy, state, update)
    assert np.isfinite(mean(metrics, "loss/preference")) and not bool(after.finite)
    jax.tree.map(np.testing.assert_array_equal, after.policy, state.policy)


def test_updates_lower_the_winners_error_against_the_losers(configure, pipeline):
    config = configure(preference__beta=100.0, optimizer__learning_rate=5e-3, lora__rank=0)
    policy, state, update = build(config, pipeline, pairs_like())
    accuracy = []
    for number in range(30):
        state, metrics = apply(policy, state, update, number)
        accuracy.append(mean(metrics, "loss/implicit_accuracy"))
    assert accuracy[0] == 0.5 and np.mean(accuracy[-10:]) > 0.9
    assert float(state.curriculum.pairs) == 120.0


def test_the_average_follows_the_policy(configure, pipeline):
    policy, state, update = build(configure(ema__decay=0.75), pipeline, pairs_like())
    after, _ = apply(policy, state, update)
    expected = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, state.ema, after.policy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), after.ema, expected)
    assert after.weights() is after.ema


@pytest.mark.parametrize("rank", [0, 4])
def test_an_extrapolated_policy_changes_every_kernel_so_many_times_as_much(configure, pipeline, rank):
    params = pipeline.params["unet"]
    policy = make_policy(configure(lora__rank=rank), pipeline.unet, params)
    noise = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(policy.start))))
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), policy.start)
    assert policy.extrapolated(policy.start, moved, 1.0) is moved
    further = policy.extrapolated(policy.start, moved, 2.5)
    once, more = (policy.merged(params, adapters) for adapters in (moved, further))
    changed = 0
    for before, a, b in zip(*map(jax.tree.leaves, (params, once, more)), strict=True):
        np.testing.assert_allclose(b - before, 2.5 * (a - before), atol=1e-5)
        changed += bool(jnp.any(a != before))
    assert changed >= (len(jax.tree.leaves(params)) if rank == 0 else len(jax.tree.leaves(moved)) // 2)


def test_the_anchor_pulls_towards_the_start(configure, pipeline):
    config = configure(lora__rank=0)
    policy, state, update = build(config, pipeline, pairs_like())
    moved = jax.tree.map(lambda x: x * 1.2, policy.start)
    noised = update.draw(state.buffer, jnp.zeros((6, 8)), 0, 0)
    nothing = losses.PairCoefficients(jnp.zeros(4), jnp.zeros(4))
    _, first = update.errors(policy.frozen, policy.start, noised)
    gradients = jax.jit(make_gradients(policy.denoise, anchor=2.0))
    pull, metrics = gradients(policy.frozen, moved, first, noised, nothing, state.buffer.mask)
    nearer = jax.tree.map(lambda x, g: x - 1e-3 * g, moved, pull)
    closer = gradients(policy.frozen, nearer, first, noised, nothing, state.buffer.mask)[1]
    assert mean(closer, "loss/anchor") < mean(metrics, "loss/anchor")
    still, metrics = gradients(policy.frozen, policy.start, first, noised, nothing, state.buffer.mask)
    assert mean(metrics, "loss/anchor") == 0.0 and float(optax.global_norm(still)) == 0.0


@pytest.mark.parametrize("schedule", ["frozen", "refresh"])
def test_the_anchor_holds_to_the_start_wherever_the_reference_is(configure, pipeline, schedule):
    config = configure(preference__anchor=2.0, reference__schedule=schedule, lora__rank=0)
    policy, state, update = build(config, pipeline, pairs_like())
    if schedule == "refresh":  # a frozen reference never leaves the start
        state = state._replace(reference=jax.tree.map(lambda x: x * 1.2, policy.start))
    _, metrics = apply(policy, state, update)
    # The policy is the start: two programs' rounding of the same predictions and no more.
    assert mean(metrics, "loss/anchor") < 1e-10


# ---- Rounding ----


def test_rounding_in_u_is_measured_in_bfloat16_and_is_nothing_in_float32(configure, pipeline):
    pairs = pairs_like()
    for dtype in ("float32", "bfloat16"):
        config = configure(model__dtype=dtype, preference__beta=5000.0, lora__rank=0)
        policy, state, update = build(config, pipeline, pairs)
        noise = update.rounding_noise(state, policy.frozen, jnp.zeros((6, 8)))
        assert noise == 0.0 if dtype == "float32" else 1e-4 < noise < 1e3
    precise, _ = update(state, policy.frozen, policy.start, jnp.zeros((6, 8)), 0, precise=True)
    assert bool(precise.finite)


def test_masters_moments_and_gradients_are_float32_when_computing_in_bfloat16(configure, pipeline):
    for rank in (0, 2):
        config = configure(model__dtype="bfloat16", lora__rank=rank)
        policy, state, update = build(config, pipeline, pairs_like())
        state, _ = apply(policy, state, update)
        for leaf in jax.tree.leaves((state.policy, state.reference, state.optimizer)):
            assert leaf.dtype in (jnp.float32, jnp.int32)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(policy.frozen))


def test_the_first_update_of_a_warm_up_already_moves(configure, pipeline):
    policy, state, update = build(configure(optimizer__warmup_steps=5), pipeline, pairs_like())
    after, _ = apply(policy, state, update)
    change = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.policy, state.policy)
    assert 0.0 < max(jax.tree.leaves(change)) <= 1e-3 / 5 * 1.01


def test_noised_clips_are_what_the_schedule_says(pipeline):
    pairs, schedule = pairs_like(), pipeline.schedule
    noised = make_draw(schedule, 5, 2)(pairs, jnp.zeros((6, 8)), 0, 0)
    assert isinstance(noised, Noised)
    at_time, at_noise = jax.random.split(stream_key(5, "noise", 0, 2, 0))
    t = int(jax.random.randint(at_time, (), 0, 100))
    eps = jax.random.normal(at_noise, (4, 4, 4, 4))
    assert int(noised.timesteps[2]) == t
    signal, sigma = schedule.signal[t], schedule.noise[t]
    np.testing.assert_allclose(noised.winner[2], signal * pairs.winner[2] + sigma * eps, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(noised.loser_target[2], signal * eps - sigma * pairs.loser[2], rtol=1e-5, atol=1e-6)
