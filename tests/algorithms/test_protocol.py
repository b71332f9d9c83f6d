"""A class that implements the algorithms' protocol and nothing else trains, once it stands in the table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh

from tests.algorithms.reinforce import Reinforce
from vpo_jax.algorithms.protocol import Entry
from vpo_jax.algorithms.state import infer_state_shardings, init_state
from vpo_jax.algorithms.table import ALGORITHMS
from vpo_jax.diffusion.trajectory import Trajectory
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import AXES, BATCH, VIDEO
from vpo_jax.runtime.metrics import read_metrics
from vpo_jax.runtime.signals import Interrupted, Stop
from vpo_jax.training.check import check

NEEDS = {"rollout__sampler": "DDIMScheduler", "rollout__eta": 1.0, "rollout__guidance_scale": 1.0}


@pytest.fixture
def reinforce(monkeypatch, configure):
    """A config of it, with one line more in the table."""
    monkeypatch.setitem(ALGORITHMS, "reinforce", Entry(Reinforce))

    def make(**overrides):
        config = configure(**{**NEEDS, **overrides})
        config.algorithm.name = "reinforce"
        return config

    return make


def test_an_algorithm_of_trajectories_trains_in_the_same_loop(reinforce, run, toy_reward, tmp_path):
    config = reinforce(eval__every=2, reference__schedule="refresh", reference__every=2)
    result = run(config, tmp_path, tuning_prompts=["t1", "t2"], held_out=[toy_reward(name="judge")])
    written = read_metrics(tmp_path)
    assert [line["step"] for line in written] == [1, 2, 3]
    for line in written:
        assert line["loss/applied"] == 1.0 and line["loss/gradient_norm"] > 0.0
        assert np.isfinite(line["loss/policy_gradient"]) and np.isfinite(line["reward/total"])
    assert "eval/gain" in written[1]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), result.state.policy, result.policy.initial)
    assert max(jax.tree.leaves(moved)) > 0.0
    memory = result.state.algorithm
    assert memory.latents.shape == (32, config.rollout.num_inference_steps + 1, 4, 4, 4, 4)
    np.testing.assert_allclose(memory.advantages.reshape(8, 4).sum(axis=1), 0.0, atol=1e-5)


@pytest.mark.slow
def test_its_part_of_the_state_survives_a_stop(reinforce, run, toy_reward, tmp_path):
    class OnHost(toy_reward):
        def score(self, params, videos, prepared):
            calls.append(1)
            if len(calls) == stop_at:
                stop.signum = 15
            return np.asarray(super().score(params, videos, prepared))

    stop, stop_at, calls = Stop(), 0, []
    whole = run(reinforce(), tmp_path / "whole", rewards=(OnHost(jittable=False),)).state
    stop_at, calls = 2, []
    with pytest.raises(Interrupted):
        run(reinforce(), tmp_path / "stopped", rewards=(OnHost(jittable=False),), stop=stop)
    stop_at = 0
    resumed = run(reinforce(), tmp_path / "stopped", rewards=(OnHost(jittable=False),)).state
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(whole))


def test_a_sampler_without_fresh_noise_is_refused(reinforce, run, tmp_path):
    with pytest.raises(UserError, match=r"^rollout\.eta: .*set rollout\.sampler=DDIMScheduler and rollout\.eta=1\.0"):
        run(reinforce(rollout__eta=0.0), tmp_path / "still")
    with pytest.raises(UserError, match=r"^rollout\.guidance_scale: .*set it to 1\.0"):
        run(reinforce(rollout__guidance_scale=2.0), tmp_path / "guided")
    with pytest.raises(UserError, match=r"^rollout\.trunk_level: reinforce keeps every .*; set it to 0\.0"):
        run(reinforce(rollout__trunk_level=0.5), tmp_path / "trunk")
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_one_candidate_has_none_to_share_a_trunk_with(reinforce):
    config = reinforce()
    config.rollout.candidates = 1
    check(config)
    config.rollout.trunk_level = 0.5
    with pytest.raises(UserError, match=r"^rollout\.trunk_level: one candidate .*; set it to 0\.0"):
        check(config)


def test_prefetched_videos_are_sharded_over_frames_and_trajectories_not_over_their_steps():
    mesh = AbstractMesh((2, 1, 3, 1), AXES)
    videos = jax.ShapeDtypeStruct((8, 6, 4, 4, 4), jnp.float32)
    path = Trajectory(jax.ShapeDtypeStruct((8, 5, 6, 4, 4, 4), jnp.float32), jax.ShapeDtypeStruct((8, 4), jnp.float32))
    state = init_state({}, optax.sgd(0.1), lambda _: {}, 1)
    for prefetched, spec in ((videos, VIDEO), (path, BATCH)):
        found = infer_state_shardings(state._replace(prefetched=prefetched), mesh, lambda tree, _: tree).prefetched
        for sharding, leaf in zip(jax.tree.leaves(found), jax.tree.leaves(prefetched), strict=True):
            assert sharding.spec == spec
            sharding.shard_shape(leaf.shape)  # every sharded dimension is divided
