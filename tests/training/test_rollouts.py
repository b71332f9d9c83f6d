"""Candidates: the same clip from any batch, only the frames that are read, frames rounded as people see them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.diffusion.guidance import Guidance
from vpo_jax.diffusion.samplers import make_sampler, sample
from vpo_jax.families.protocol import Text
from vpo_jax.rewards.scoring import Scores, Weights, frames_to_decode
from vpo_jax.runtime.batches import fit_microbatch
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import Meshes, make_mesh
from vpo_jax.training.policy import make_policy
from vpo_jax.training.programs import decode_program, first_step, make_programs
from vpo_jax.training.rollouts import (
    make_branches,
    make_candidate_keys,
    make_rollout,
    make_trunk_keys,
)
from vpo_jax.training.setup import make_setup

SHAPE = (4, 4, 4, 4)


@pytest.fixture
def weights():
    return Weights(make_mesh(1, devices=jax.devices()[:1]))


def setup(configure, pipeline, **options):
    policy = make_policy(configure(), pipeline.family, pipeline.trainable)
    sampler = make_sampler(pipeline.scheduler_config, 3, None, options.pop("eta", 0.0))
    rollout = make_rollout(policy.denoise, sampler, SHAPE, Guidance(options.pop("guidance_scale", 2.0)), **options)
    text = Text(jnp.asarray(np.random.default_rng(0).normal(size=(6, 6, 8)), jnp.float32))
    return policy, lambda text, keys: rollout(policy.frozen, policy.initial, text, Text(jnp.zeros((6, 8))), keys), text


def test_every_candidate_of_every_slot_and_step_has_a_key_of_its_own():
    keys = make_candidate_keys(0, 5, 3)
    data = np.concatenate([jax.random.key_data(keys(step)) for step in (0, 1)])
    assert len(np.unique(data, axis=0)) == 30


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_clip_comes_out_the_same_in_any_microbatch_and_any_batch(configure, pipeline, eta):
    _, whole, text = setup(configure, pipeline, eta=eta)
    keys = make_candidate_keys(0, 3, 2)(4)
    latents = whole(text, keys)
    for microbatch in (1, 2, 3):
        _, parts, _ = setup(configure, pipeline, eta=eta, microbatch=microbatch)
        # The same operations on other batch sizes: float32 rounding.
        np.testing.assert_allclose(parts(text, keys), latents, atol=2e-5)
    np.testing.assert_allclose(whole(Text(text.hidden[2:4]), keys[2:4]), latents[2:4], atol=2e-5)


def test_a_prompt_that_stands_twice_gets_different_videos(configure, pipeline):
    _, rollout, text = setup(configure, pipeline)
    latents = rollout(Text(jnp.repeat(text.hidden[:1], 6, axis=0)), make_candidate_keys(0, 3, 2)(0))
    assert all(not np.allclose(latents[i], latents[j], atol=1e-2) for i in range(6) for j in range(i))


def test_guidance_is_the_difference_from_the_negative_prompt(configure, pipeline):
    policy, guided, text = setup(configure, pipeline, guidance_scale=3.0)
    keys = make_candidate_keys(0, 3, 2)(0)
    sampler = make_sampler(pipeline.scheduler_config, 3)
    noise = jax.vmap(lambda k: jax.random.normal(jax.random.split(k)[0], SHAPE))(keys)

    def denoise(latents, timestep):
        at = jnp.full(6, timestep)
        without = policy.denoise(policy.frozen, policy.initial, latents, at, Text(jnp.zeros((6, 6, 8))))
        with_text = policy.denoise(policy.frozen, policy.initial, latents, at, text)
        return without + 3.0 * (with_text - without)

    np.testing.assert_allclose(guided(text, keys), sample(sampler, denoise, noise), atol=5e-5)


def test_a_guidance_scale_of_1_saves_the_unconditional_half(configure, pipeline):
    policy = make_policy(configure(), pipeline.family, pipeline.trainable)
    batches = []

    def denoise(frozen, adapters, latents, *rest):
        batches.append(latents.shape[0])
        return latents

    for scale in (1.0, 2.0):
        rollout = make_rollout(denoise, make_sampler(pipeline.scheduler_config, 3), SHAPE, Guidance(scale))
        rollout(
            policy.frozen,
            policy.initial,
            Text(jnp.zeros((6, 6, 8))),
            Text(jnp.zeros((6, 8))),
            make_candidate_keys(0, 3, 2)(0),
        )
    assert set(batches) == {6, 12}


def test_only_the_union_of_the_scorers_frames_is_decoded_and_rounded_to_uint8(pipeline, toy_reward, weights):
    class Ends(toy_reward):
        def frame_indices(self, num_frames):
            return (0, num_frames - 1)

    rewards = [toy_reward(), Ends(name="ends")]
    frames = frames_to_decode(rewards, 4)
    assert frames == (0, 2, 3)
    latents = jnp.asarray(np.random.default_rng(1).normal(size=(4, *SHAPE)), jnp.float32)

    def decode(frames, microbatch):
        shape = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
        return decode_program(pipeline, frames, shape, 4, microbatch).function(pipeline.decoder_params, latents)

    videos = decode(frames, 0)
    assert videos.dtype == jnp.uint8 and videos.shape == (4, 3, 4, 4, 3)
    everything = decode(range(4), 2)
    np.testing.assert_array_equal(videos, everything[:, np.array(frames)])
    scores = Scores(rewards, weights, 4, frames)(videos, ["a"] * 4)
    assert scores.shape == (4, 4) and scores.dtype == jnp.float32
    pixels = np.asarray(everything, np.float32) / 255
    np.testing.assert_allclose(scores[:, 0], pixels[:, [0, 2]].mean((1, 2, 3, 4)), rtol=1e-5)
    np.testing.assert_allclose(scores[:, 2], pixels[:, [0, 3]].mean((1, 2, 3, 4)), rtol=1e-5)


def test_a_scorer_on_the_host_gives_the_same_scores(toy_reward, weights):
    class OnHost(toy_reward):
        def score(self, params, videos, prepared):
            assert isinstance(videos, np.ndarray) and videos.dtype == np.uint8
            return np.asarray(super().score(params, videos, prepared))

    videos = np.random.default_rng(2).integers(0, 256, (4, 2, 4, 4, 3)).astype(np.uint8)
    host = Scores([OnHost(jittable=False)], weights, 4, (0, 2))(jnp.asarray(videos), ["a"] * 4)
    traced = Scores([toy_reward()], weights, 4, (0, 2), 2)(jnp.asarray(videos), ["a"] * 4)
    np.testing.assert_allclose(host, traced, rtol=1e-6)


def test_weights_of_a_scorer_are_placed_once_or_with_offload_for_every_call(toy_reward):
    mesh = make_mesh(1, devices=jax.devices()[:1])
    reward = toy_reward(params={"kernel": np.ones((4, 4), np.float32)})
    resident, offloaded = Weights(mesh), Weights(mesh, offload=True)
    assert resident(reward)["kernel"] is resident(reward)["kernel"]
    assert offloaded(reward)["kernel"] is not offloaded(reward)["kernel"]
    np.testing.assert_array_equal(offloaded(reward)["kernel"], reward.params["kernel"])


@pytest.mark.parametrize("microbatch", [0, 2])
def test_a_rollout_that_keeps_its_trajectory_ends_at_the_same_videos(configure, pipeline, microbatch):
    keys = make_candidate_keys(0, 3, 2)(4)
    _, plain, text = setup(configure, pipeline, eta=1.0, microbatch=microbatch)
    _, kept, _ = setup(configure, pipeline, eta=1.0, microbatch=microbatch, keep_trajectory=True)
    path = kept(text, keys)
    assert path.latents.shape == (6, 4, *SHAPE) and path.log_probabilities.shape == (6, 3)
    np.testing.assert_array_equal(path.latents[:, -1], plain(text, keys))
    assert np.isfinite(path.log_probabilities).all() and (np.asarray(path.log_probabilities[:, :-1]) != 0.0).all()


def candidates_of(configure, pipeline, toy_reward, **overrides):
    """(the setup, latents [P, N, F, H, W, C] of step 0) of a run of 8 prompts, one device."""
    config = configure(rollout__num_inference_steps=4, rollout__guidance_scale=1.0, **overrides)
    with jax.set_mesh(mesh := make_mesh(1, devices=jax.devices()[:1])):
        setup = make_setup(config, pipeline, [toy_reward()], Meshes.of(mesh), [f"{i} balls" for i in range(8)])
        found = setup.rollouts.next(setup.fresh_state(), 0)
        return setup, setup.encode(found.prompts), np.asarray(found.rollout.latents).reshape(8, 4, *SHAPE)


def test_the_candidates_of_a_prompt_begin_from_one_video_under_noise_of_their_own(configure, pipeline, toy_reward):
    setup, text, found = candidates_of(configure, pipeline, toy_reward, rollout__trunk_level=0.5)
    frozen, initial = setup.frozen.backbone, setup.frozen.initial
    predict = setup.policy.denoise

    def denoise(latents, timestep):
        repeated = jax.tree.map(lambda x: jnp.repeat(x, len(latents) // 8, axis=0), text)
        return predict(frozen, initial, latents, jnp.full(len(latents), timestep), repeated)

    def noise(keys):
        return jax.vmap(lambda key: jax.random.normal(jax.random.split(key)[0], SHAPE))(keys)

    trunks = sample(make_sampler(pipeline.scheduler_config, 4), denoise, noise(make_trunk_keys(0, 8)(0)))
    later = make_sampler(pipeline.scheduler_config, 4, first=1)  # of the timesteps 75, 50, 25, 0 of 100
    start = later.noised(jnp.repeat(trunks, 4, axis=0), noise(make_candidate_keys(0, 8, 4)(0)))
    # The same operations in other programs: float32 rounding.
    np.testing.assert_allclose(found.reshape(start.shape), sample(later, denoise, start), atol=5e-5)


def test_the_lower_the_trunk_level_the_less_the_candidates_of_a_prompt_differ(configure, pipeline, toy_reward):
    def spread(level):
        found = candidates_of(configure, pipeline, toy_reward, rollout__trunk_level=level)[2]
        return float(found.std(axis=1).mean())

    some, more, independent = spread(0.25), spread(0.5), spread(0.0)
    assert 0.0 < some < more < independent


def test_candidates_from_a_trunk_come_out_the_same_in_any_microbatch_and_any_batch(configure, pipeline):
    policy = make_policy(configure(), pipeline.family, pipeline.trainable)
    sampler = make_sampler(pipeline.scheduler_config, 3, None, 1.0, first=1)
    text = Text(jnp.asarray(np.random.default_rng(0).normal(size=(6, 6, 8)), jnp.float32))
    trunks = jnp.asarray(np.random.default_rng(1).normal(size=(6, *SHAPE)), jnp.float32)
    keys, negative = make_candidate_keys(0, 3, 2)(4), Text(jnp.zeros((6, 8)))

    def branched(microbatch, rows=slice(None)):
        branches = make_branches(policy.denoise, sampler, Guidance(2.0), microbatch)
        return branches(policy.frozen, policy.initial, Text(text.hidden[rows]), negative, keys[rows], trunks[rows])

    whole = branched(0)
    for microbatch in (1, 4):  # four of six: two at a time
        np.testing.assert_allclose(branched(microbatch), whole, atol=2e-5)
    np.testing.assert_allclose(branched(0, slice(2, 4)), whole[2:4], atol=2e-5)


@pytest.mark.parametrize(
    ("microbatch", "batch", "rows"), [(0, 6, 6), (8, 6, 6), (6, 6, 6), (3, 6, 3), (4, 6, 2), (8, 12, 4)]
)
def test_a_microbatch_that_does_not_divide_a_batch_gives_way(microbatch, batch, rows):
    assert fit_microbatch(microbatch, batch) == rows


def test_a_trunk_is_a_whole_sample_a_prompt_and_a_part_of_one_a_candidate(configure, pipeline, toy_reward):
    def programs(level):
        config = configure(rollout__trunk_level=level, rollout__num_inference_steps=4)
        policy = make_policy(config, pipeline.family, pipeline.trainable)
        return make_programs(config, pipeline, policy, [toy_reward()])

    plain, structured = programs(0.0), programs(0.5)
    assert "branch" not in [program.name for program in plain.all]
    assert plain.candidates is plain.rollout and (plain.rollout.batch, plain.rollout.passes) == (32, 4)
    assert [program.name for program in structured.all][:4] == ["encode", "rollout", "branch", "decode"]
    assert [(p.batch, p.passes) for p in (structured.rollout, structured.branch)] == [(8, 4), (32, 3)]
    made = jax.eval_shape(structured.branch.function, *structured.branch.arguments(32))
    assert made.shape == (32, *SHAPE)


@pytest.mark.parametrize(
    ("level", "first"), [(0.74, 1), (0.735, 2), (0.5, 2), (0.25, 3), (1.0, 0), (0.99, 0), (0.2, 4)]
)
def test_candidates_begin_at_the_first_timestep_that_is_at_most_the_level(pipeline, level, first):
    sampler = make_sampler({**pipeline.scheduler_config, "timestep_spacing": "trailing"}, 4)
    assert sampler.timesteps.tolist() == [99, 74, 49, 24]
    if 0 < first < 4:
        assert first_step(sampler, level, 100) == first
        return
    said = rf"at {level:g} candidates take every step, the first at 0\.99 of the schedule, .*; give less than that"
    if first == 4:
        said = r"0\.2 leaves candidates no step: the last of 4 is at 0\.24 of the schedule; give more, or raise"
    with pytest.raises(UserError, match=rf"^rollout\.trunk_level: {said}"):
        first_step(sampler, level, 100)
