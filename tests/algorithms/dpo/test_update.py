"""One update: what a group shares, what is exact at theta = phi, and what leaves the state alone."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vpo_jax.algorithms.dpo import losses
from vpo_jax.algorithms.dpo.algorithm import DPO, DPOState, make_loss
from vpo_jax.algorithms.dpo.selection import PAIRS, Groups
from vpo_jax.algorithms.dpo.update import Weighed, make_draw, make_errors, make_gradients, make_weigh
from vpo_jax.algorithms.protocol import Frozen, Setting
from vpo_jax.algorithms.state import init_state
from vpo_jax.families.protocol import Text
from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig
from vpo_jax.runtime.keys import stream_key
from vpo_jax.training.optimizer import make_optimizer
from vpo_jax.training.policy import make_policy

LN2 = np.float32(np.log(2.0))
EMPTY = Text(jnp.zeros((6, 8)))
SHAPE = (4, 4, 4, 4)


# ---- Builders ----


def groups_like(mask=(True,) * 4, step=0, size=2, seed=0):
    """Groups of `size` candidates; of two, the first is the winner."""
    rng = np.random.default_rng(seed)
    n = len(mask)
    latents = np.stack(list(rng.normal(size=(size, n, *SHAPE)).astype(np.float32)), axis=1)
    text = rng.normal(size=(n, 6, 8))
    rewards = np.stack([np.linspace(1.0, 2.0, n), -np.ones(n)], axis=1) if size == 2 else rng.normal(size=(n, size))
    return Groups(
        latents=jnp.asarray(latents),
        text=Text(jnp.asarray(text, jnp.float32)),
        rewards=jnp.asarray(rewards, jnp.float32),
        preferred=jnp.asarray(rewards[:, :, None] > rewards[:, None, :]),
        learnt=jnp.ones((n, size), bool),
        mask=jnp.asarray(mask),
        slot=jnp.arange(n, dtype=jnp.int32),
        step=jnp.full(n, step, jnp.int32),
    )


def policy_of(config, pipeline):
    return make_policy(config, pipeline.family, pipeline.trainable)


def levels(pipeline, timesteps):
    """(signal, noise) at timesteps, broadcast over latents."""
    return (np.asarray(table)[..., None, None, None, None] for table in pipeline.process.levels(jnp.asarray(timesteps)))


class Built(NamedTuple):
    policy: object
    frozen: Frozen
    state: object
    dpo: DPO


def build(config, pipeline, groups, denoise=None):
    """DPO on these groups; `denoise` in place of the policy's."""
    policy, optimizer = policy_of(config, pipeline), make_optimizer(config.optimizer)
    frozen = Frozen(policy.frozen, policy.initial, EMPTY)
    setting = Setting(
        config=config,
        denoise=denoise or policy.denoise,
        denoise_float32=denoise or policy.in_float32().denoise,
        process=pipeline.process,
        sampler=None,
        optimizer=optimizer,
        rewards=[],
        latents=jax.ShapeDtypeStruct(SHAPE, jnp.float32),
        text=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), EMPTY),
        frozen=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), frozen),
        rules=pipeline.family.sharding_rules,
    )
    dpo = DPO(setting)
    state = init_state(policy.initial, optimizer, dpo.init, 2, with_ema=config.ema.decay > 0)
    state = state._replace(algorithm=DPOState(groups, groups, jnp.array(False)))
    return Built(policy, frozen, state, dpo)


def apply(built, state=None, number=0):
    # A donated buffer must not be one that the test still reads.
    state = jax.tree.map(lambda x: jnp.array(x, copy=True), built.state if state is None else state)
    return built.dpo.update(state, built.frozen, number)


def with_buffer(state, groups):
    return state._replace(algorithm=state.algorithm._replace(buffer=groups))


def constants(coefficients, mask=None):
    """What a gradient needs: these constants [P, K] and an even share for every candidate that the mask keeps."""
    coefficients = jnp.asarray(coefficients, jnp.float32)
    mask = jnp.ones(len(coefficients), bool) if mask is None else mask
    shares = jnp.broadcast_to(mask[:, None] / coefficients.shape[1], coefficients.shape)
    kept = jnp.sum(mask, dtype=jnp.float32)
    coefficients = jnp.where(mask[:, None], coefficients, 0.0)
    return Weighed(coefficients, shares, kept, jnp.maximum(1.0, kept), jnp.any(mask), jnp.zeros(()))


def pair_constants(winner, loser, mask=None):
    return constants(jnp.stack([winner, -loser], axis=1), mask)


def mean(metrics, name):
    return float(metrics[name][0] / metrics[name][1])


def form(configure, pairs, **overrides):
    """The config of a form that learns from 4 candidates."""
    return configure(
        preference__pairs=pairs, preference__label_temperature=0.5 if pairs == "listwise" else 0.0, **overrides
    )


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
    for fold in (False, True):
        policy = policy_of(configure(lora__fold=fold), pipeline)
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


@pytest.mark.parametrize(("pairs", "size"), [("best_worst", 2), ("all", 4), ("group", 4), ("listwise", 4)])
def test_updates_lower_the_winners_error_against_the_losers(configure, pipeline, pairs, size):
    overrides = {"preference__beta": 100.0, "optimizer__learning_rate": 5e-3, "lora__rank": 0}
    built = build(form(configure, pairs, **overrides), pipeline, groups_like(size=size))
    state, accuracy = built.state, []
    for number in range(30):
        state, metrics = apply(built, state, number)
        accuracy.append(mean(metrics, "loss/implicit_accuracy"))
    assert accuracy[0] == 0.5 and np.mean(accuracy[-10:]) > 0.9
    assert float(state.curriculum.pairs) == 120.0


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
