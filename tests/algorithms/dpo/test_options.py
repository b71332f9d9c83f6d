"""Options of an update: the average, extrapolation, the safeguard, the anchor, bfloat16 and warm-up."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.algorithms.dpo.building import EMPTY, apply, build, constants, form, groups_like, mean, policy_of
from vpo_jax.algorithms.dpo import losses
from vpo_jax.algorithms.dpo.update import make_gradients, make_weigh


def test_the_average_follows_the_policy(configure, pipeline):
    built = build(configure(ema__decay=0.75), pipeline, groups_like())
    after, _ = apply(built)
    expected = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, built.state.ema, after.policy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), after.ema, expected)
    assert after.weights() is after.ema


@pytest.mark.parametrize("rank", [0, 4])
def test_an_extrapolated_policy_changes_every_kernel_so_many_times_as_much(configure, pipeline, rank):
    params = pipeline.trainable
    policy = policy_of(configure(lora__rank=rank), pipeline)
    noise = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(policy.initial))))
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), policy.initial)
    assert policy.extrapolated(policy.initial, moved, 1.0) is moved
    further = policy.extrapolated(policy.initial, moved, 2.5)
    once, more = (policy.merged(params, adapters) for adapters in (moved, further))
    changed = 0
    for before, a, b in zip(*map(jax.tree.leaves, (params, once, more)), strict=True):
        np.testing.assert_allclose(b - before, 2.5 * (a - before), atol=1e-5)
        changed += bool(jnp.any(a != before))
    assert changed >= (len(jax.tree.leaves(params)) if rank == 0 else len(jax.tree.leaves(moved)) // 2)


# ---- Safeguard and anchor ----


def test_the_safeguard_scales_the_losers_gradient_and_leaves_values_alone():
    rng = np.random.default_rng(9)
    groups = groups_like((True,) * 64)
    theta = jnp.asarray(rng.uniform(0.5, 1.0, 128), jnp.float32)
    residuals = jnp.asarray(rng.normal(size=(64, 1, 3, 4)) + rng.normal(size=(64, 2, 3, 4)), jnp.float32)

    def loss_of(change, rewards, preferred, learnt):
        found = losses.make_pairwise_loss(500.0)(change, rewards, preferred, learnt)
        return found._replace(coefficients=jnp.broadcast_to(jnp.array([2.0, -3.0]), (64, 2)))

    phi = theta[::-1]
    plain, without = make_weigh(loss_of)(groups, theta, phi, None)
    guarded, metrics = make_weigh(loss_of, safeguard_mu=0.9)(groups, theta, phi, residuals.reshape(128, 3, 4))
    share = losses.safeguard_share(residuals, plain.coefficients, 0.9)
    assert plain.loss == guarded.loss
    for name in without:
        np.testing.assert_array_equal(without[name], metrics[name])
    np.testing.assert_array_equal(guarded.coefficients[:, 0], 2.0)
    np.testing.assert_allclose(guarded.coefficients[:, 1], -3.0 * share, rtol=1e-6)
    np.testing.assert_allclose(mean(metrics, "loss/loser_share"), share.mean(), rtol=1e-5)
    assert 0.0 < share.min() < 0.5 and share.max() == 1.0


@pytest.mark.parametrize("pairs", ["best_worst", "all", "group", "listwise"])
def test_the_safeguard_is_of_a_group_and_not_of_a_microbatch(configure, pipeline, pairs):
    size = 2 if pairs == "best_worst" else 4
    found = []
    for microbatch in (0, 2, 1):
        overrides = {"preference__winner_safeguard": True, "preference__anchor": 0.3, "train__microbatch": microbatch}
        built = build(form(configure, pairs, lora__rank=0, **overrides), pipeline, groups_like(size=size))
        state = built.state._replace(policy=jax.tree.map(lambda x: x * 1.05, built.state.policy))
        after, metrics = apply(built, state)
        change = jax.tree.map(jnp.subtract, after.policy, state.policy)
        found.append((change, mean(metrics, "loss/loser_share"), mean(metrics, "loss/gradient_norm")))
    for _, share, norm in found[1:]:
        assert share == pytest.approx(found[0][1], rel=1e-5) and share < 1.0
        assert norm == pytest.approx(found[0][2], rel=1e-4)


def test_the_anchor_pulls_towards_the_initial_policy(configure, pipeline):
    groups = groups_like()
    built = build(configure(lora__rank=0), pipeline, groups)
    frozen, initial = built.frozen.backbone, built.policy.initial
    moved = jax.tree.map(lambda x: x * 1.2, initial)
    noised = built.dpo.draw(groups, EMPTY, 0, 0)
    nothing = constants(jnp.zeros((4, 2)))
    _, first = built.dpo.errors(frozen, initial, noised)
    gradients = jax.jit(make_gradients(built.policy.denoise, anchor=2.0))
    pull, metrics = gradients(frozen, moved, first, noised, nothing)
    nearer = jax.tree.map(lambda x, g: x - 1e-3 * g, moved, pull)
    closer = gradients(frozen, nearer, first, noised, nothing)[1]
    assert mean(closer, "loss/anchor") < mean(metrics, "loss/anchor")
    still, metrics = gradients(frozen, initial, first, noised, nothing)
    assert mean(metrics, "loss/anchor") == 0.0 and float(optax.global_norm(still)) == 0.0


def test_the_anchor_is_a_mean_over_the_candidates_that_are_learnt_and_then_over_groups(configure, pipeline):
    groups = groups_like((True, True, False, True), size=4)
    learnt = groups.learnt.at[0, 1:3].set(False).at[3, 0].set(False)
    groups = groups._replace(learnt=learnt, preferred=groups.preferred & learnt[:, :, None] & learnt[:, None, :])
    built = build(form(configure, "group", lora__rank=0), pipeline, groups)
    frozen, initial = built.frozen.backbone, built.policy.initial
    moved = jax.tree.map(lambda x: x * 1.2, initial)
    noised = built.dpo.draw(groups, EMPTY, 0, 0)
    (theta, now), (phi, first) = (built.dpo.errors(frozen, tree, noised) for tree in (moved, initial))
    weighed, _ = built.dpo.weigh(groups, theta, phi, None)
    shares = np.where(learnt, 1.0 / np.sum(learnt, axis=1, keepdims=True), 0.0)
    shares[2] = 0.0
    np.testing.assert_allclose(weighed.shares, shares, rtol=1e-6)
    distances = np.asarray(losses.squared_error(now, first), np.float64).reshape(4, 4)
    nothing = weighed._replace(coefficients=jnp.zeros((4, 4)))
    _, metrics = jax.jit(make_gradients(built.policy.denoise, anchor=2.0))(frozen, moved, first, noised, nothing)
    np.testing.assert_allclose(mean(metrics, "loss/anchor"), (shares * distances).sum() / 3, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["frozen", "refresh"])
def test_the_anchor_holds_to_the_initial_policy_wherever_the_reference_is(configure, pipeline, schedule):
    config = configure(preference__anchor=2.0, reference__schedule=schedule, lora__rank=0)
    built = build(config, pipeline, groups_like())
    state = built.state
    if schedule == "refresh":  # a frozen reference never leaves the initial policy
        state = state._replace(reference=jax.tree.map(lambda x: x * 1.2, built.policy.initial))
    _, metrics = apply(built, state)
    # The policy is the initial one: two programs' rounding of the same predictions and no more.
    assert mean(metrics, "loss/anchor") < 1e-10


# ---- Rounding ----


@pytest.mark.parametrize("pairs", ["best_worst", "group"])
def test_rounding_in_u_is_measured_in_bfloat16_and_is_nothing_in_float32(configure, pipeline, pairs):
    groups = groups_like(size=2 if pairs == "best_worst" else 4)
    for dtype in ("float32", "bfloat16"):
        config = form(configure, pairs, model__dtype=dtype, preference__beta=5000.0, lora__rank=0)
        built = build(config, pipeline, groups)
        noise = built.dpo.rounding_noise(built.state, built.frozen)
        assert noise == 0.0 if dtype == "float32" else 1e-4 < noise < 1e3
    own, built.dpo.errors = built.state.algorithm, None  # not called where errors are taken in float32
    precise, _ = apply(built, built.state._replace(algorithm=own._replace(precise=jnp.array(True))))
    assert bool(precise.finite)


def test_rounding_that_is_too_large_switches_errors_to_float32_once_and_says_so(configure, pipeline):
    config = configure(model__dtype="bfloat16", preference__beta=5000.0, lora__rank=0)
    built = build(config, pipeline, groups_like())
    built.dpo.rounding_noise = lambda state, frozen: 0.2
    state, measured, said = built.dpo.calibrate(built.state, built.frozen)
    assert bool(state.algorithm.precise) and measured == {"loss/u_noise": 0.2} and "errors now in float32" in said
    again, _, said = built.dpo.calibrate(state, built.frozen)
    assert bool(again.algorithm.precise) and said == ""
    built.dpo.rounding_noise = lambda state, frozen: 0.05
    state, _, said = built.dpo.calibrate(built.state, built.frozen)
    assert not bool(state.algorithm.precise) and said == ""


def test_masters_moments_and_gradients_are_float32_when_computing_in_bfloat16(configure, pipeline):
    for rank in (0, 2):
        built = build(configure(model__dtype="bfloat16", lora__rank=rank), pipeline, groups_like())
        state, _ = apply(built)
        for leaf in jax.tree.leaves((state.policy, state.reference, state.optimizer)):
            assert leaf.dtype in (jnp.float32, jnp.int32)
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(built.frozen.backbone))


def test_the_first_update_of_a_warm_up_already_moves(configure, pipeline):
    built = build(configure(optimizer__warmup_steps=5), pipeline, groups_like())
    after, _ = apply(built)
    change = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after.policy, built.state.policy)
    assert 0.0 < max(jax.tree.leaves(change)) <= 1e-3 / 5 * 1.01
