"""A person's own function trains, and a run in which it hangs or fails continues as if nothing had been."""

import json
import sys

import jax
import numpy as np
import pytest

from vpo_jax.rewards.loading import load_rewards
from vpo_jax.runtime.errors import UserError

MODULE = """
import threading
import numpy as np

calls, hang_at, fail_at, release = [], None, None, threading.Event()

def bright(videos, prompts):
    calls.append(len(videos))
    if len(calls) == hang_at:
        release.wait(60)
    if len(calls) == fail_at:
        raise ConnectionError("the server is gone")
    scores = videos.mean((1, 2, 3, 4)) / 255
    if len(calls) == 1:
        scores[0] = np.nan
    return {"bright": scores}

bright.dimensions, bright.ranges = ("bright",), ((0.0, 1.0),)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_for_training.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import mine_for_training as module

    yield module
    module.release.set()
    sys.modules.pop("mine_for_training")


@pytest.mark.slow
def test_a_run_whose_reward_hangs_or_fails_stops_by_name_and_continues_to_the_same_bits(configure, run, mine, tmp_path):
    config = configure(train__steps=3, train__updates_per_step=1)

    def go(folder):
        return run(config, tmp_path / folder, rewards=load_rewards("mine_for_training:bright", True, config.reward))

    whole = go("whole")
    first = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert mine.calls == [32] * 3 and first["reward/non_finite"] > 0

    mine.calls.clear()
    mine.hang_at, config.reward.timeout = 2, 2.0
    with pytest.raises(UserError, match=r"reward\.timeout: mine_for_training:bright has not answered for 32 videos"):
        go("cut")
    # The limit may be another one when the run goes on.
    mine.hang_at, mine.fail_at, config.reward.timeout = None, 3, 60.0
    with pytest.raises(UserError, match=r"bright raised ConnectionError in mine_for_training\.py, line 12"):
        go("cut")
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir() if path.name.isdigit()]
    cut = go("cut")
    assert int(cut.state.step) == 3
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(cut.state.policy), jax.device_get(whole.state.policy))
