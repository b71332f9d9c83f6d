"""Candidates: the same clip from any batch, only the frames that are read, frames rounded as people see them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.diffusion.guidance import Guidance
from vpo_jax.diffusion.samplers import make_sampler, sample
from vpo_jax.families.protocol import Text
from vpo_jax.rewards.scoring import Scores, Weights, frames_to_decode
from vpo_jax.runtime.mesh import make_mesh
from vpo_jax.training.policy import make_policy
from vpo_jax.training.programs import decode_program
from vpo_jax.training.rollouts import make_candidate_keys, make_rollout

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
