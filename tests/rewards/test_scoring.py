"""Scorers on batches: a prompt is read once for its candidates, whatever the microbatch, the mesh and the place."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.running import ROOT, on_devices
from tests.toy_scorer import ToyScorer
from vpo_jax.rewards import scoring
from vpo_jax.rewards.custom.origin import Origin
from vpo_jax.rewards.custom.reward import FunctionReward
from vpo_jax.rewards.loading import load_reward
from vpo_jax.rewards.protocol import repeat_rows
from vpo_jax.rewards.scoring import Scores, Weights, candidates_together, make_scorer, score_function
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import make_mesh
from vpo_jax.shapes import world

PROMPTS = ["one", "two words"]


@pytest.fixture
def weights():
    return Weights(make_mesh(1, devices=jax.devices()[:1]))


def noise(count, frames=2, size=8):
    return np.random.default_rng(0).integers(0, 256, (count, frames, size, size, 3), np.uint8)


@pytest.mark.parametrize(
    ("microbatch", "parts", "together"),
    [
        (0, 1, 4),  # all of 16 videos of 4 prompts
        (8, 1, 4),
        (4, 1, 4),
        (2, 1, 2),  # half of a prompt's candidates
        (1, 1, 1),
        (0, 4, 4),  # a prompt a device
        (8, 4, 2),
        (0, 8, 2),
        (4, 4, 1),
        (0, 16, 1),
        (0, 3, 4),  # devices that cannot share the videos all compute all of them
    ],
)
def test_as_many_candidates_of_a_prompt_as_a_microbatch_on_a_device_holds_stay_together(microbatch, parts, together):
    assert candidates_together(16, 4, microbatch, parts) == together


def test_videos_that_do_not_share_out_among_the_prompts_are_a_user_error():
    with pytest.raises(UserError, match="prompts: 3 for 16 videos"):
        candidates_together(16, 3, 0, 1)


@pytest.mark.parametrize(("microbatch", "traced"), [(0, (8, 2)), (4, (4, 1)), (2, (2, 1)), (1, (1, 1)), (16, (8, 2))])
def test_a_microbatch_holds_whole_prompts_where_it_can_and_scores_stay_the_same(weights, microbatch, traced):
    toy, videos = ToyScorer(), noise(8)
    scores = Scores([toy], weights, 2, (0, 1), microbatch)(jnp.asarray(videos), PROMPTS)
    assert toy.traced == [traced]
    np.testing.assert_array_equal(scores[:, 1], [1] * 4 + [2] * 4)
    np.testing.assert_allclose(scores[:, 0], videos.mean((1, 2, 3, 4)) / 255, rtol=1e-5)


def test_microbatches_of_parts_of_prompts_read_one_for_as_many_candidates_as_lie_together(weights):
    toy, videos = ToyScorer(), noise(12)
    scores = Scores([toy], weights, 2, (0, 1), 4)(jnp.asarray(videos), PROMPTS)  # six candidates, four at a time
    assert toy.traced == [(4, 2)]
    np.testing.assert_array_equal(scores[:, 1], [1] * 6 + [2] * 6)


def test_four_devices_keep_their_own_prompts_and_give_the_same_scores():
    env = on_devices(4) | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("on_four_devices.py"))]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {micro: one["traced"] for micro, one in found.items()} == {"0": [16, 4], "4": [4, 4], "8": [8, 4]}
    assert all(not one["collectives"] for one in found.values()), found
    assert max(one["apart"] for one in found.values()) <= 1e-6, found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shapes", "classical", "judge"])
def test_a_row_a_prompt_gives_the_bits_of_a_row_a_video(name):
    reward, captions = load_reward(name), list(world.captions("tune")[:2])
    videos = noise(4, 8, 32)
    score = jax.jit(reward.score) if reward.jittable else reward.score
    once = reward.prepare(captions)
    scores = [score(reward.params, videos, prepared) for prepared in (once, repeat_rows(once, 4))]
    np.testing.assert_array_equal(*scores)


def test_a_plain_function_gets_one_prompt_a_video(weights):
    asked = []

    def words(videos, prompts):
        asked.append(prompts)
        return {"words": [float(len(prompt.split())) for prompt in prompts]}

    reward = FunctionReward(Origin("mine:words", "reward.scorers"), words, ("words",), trains=True)
    scores = Scores([reward], weights, 2, (0, 1))(jnp.asarray(noise(4)), PROMPTS)
    assert asked == [["one", "one", "two words", "two words"]]
    assert np.asarray(scores).tolist() == [[1.0], [1.0], [2.0], [2.0]]


def test_a_scorer_on_the_host_gets_a_row_a_prompt_too(weights):
    toy = ToyScorer()
    toy.jittable = False
    scores = Scores([toy], weights, 4, range(4))(jnp.asarray(noise(6, 4)), PROMPTS)
    assert toy.traced == [(6, 2)]
    np.testing.assert_array_equal(scores[:, 1], [1] * 3 + [2] * 3)


@pytest.mark.parametrize(("prompts", "traced"), [(2, (3, 1)), (3, (3, 3))])
def test_processes_share_whole_prompts_where_each_gets_as_many(monkeypatch, prompts, traced):
    toy, videos, parts = ToyScorer(), noise(6), []
    asked = ["one", "two words", "and three words"][:prompts]
    expected = toy.score(toy.params, videos, toy.prepare(asked))
    toy.traced.clear()

    def unshare(rows, number):
        parts.append(rows)
        return np.zeros((number, *rows.shape[1:]), np.float32)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(scoring, "unshare", unshare)
    for process in range(2):
        monkeypatch.setattr(scoring, "share", lambda rows, process=process: rows[process::2])
        scoring._on_hosts(toy, (0, 1), toy.params, videos, toy.prepare(asked))
    monkeypatch.undo()
    assert toy.traced == [traced] * 2
    together = np.stack(parts, axis=1).reshape(6, 2)  # as `unshare` joins them
    np.testing.assert_allclose(together, expected, rtol=1e-6)


def test_a_scorer_that_keeps_nothing_of_the_prompts_is_scored_too(weights):
    toy = ToyScorer()
    toy.prepare = lambda prompts: {}
    toy.score = lambda params, videos, prepared: jnp.asarray(videos, jnp.float32).mean((1, 2, 3, 4))[:, None]
    scores = Scores([toy], weights, 2, (0, 1), 4)(jnp.asarray(noise(8)), PROMPTS)
    assert scores.shape == (8, 1)


def test_training_and_calls_by_hand_run_the_same_function(weights):
    toy, videos = ToyScorer(), noise(4)
    prompts = ["one", "one", "two words", "two words"]
    by_hand = make_scorer(toy)(videos, prompts)
    in_training = Scores([toy], weights, 2, (0, 1))(jnp.asarray(videos), prompts)
    planned = score_function(toy, (0, 1))(toy.params, videos, toy.prepare(prompts))
    np.testing.assert_array_equal(np.stack(list(by_hand.values()), axis=1), in_training)
    np.testing.assert_array_equal(planned, in_training)
