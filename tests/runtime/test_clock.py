import json

import pytest

from vpo_jax.runtime import clock
from vpo_jax.runtime.clock import Stopwatch


@pytest.fixture
def now(monkeypatch):
    """Seconds that pass only when a test says so."""
    time = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: time[0])
    return time


def test_phases_add_up_within_a_lap_and_begin_again_after_it(now):
    watch = Stopwatch()
    for seconds in (1.0, 2.0):
        with watch.phase("rollout"):
            now[0] += seconds
    now[0] += 0.5
    assert watch.lap() == {"time/rollout": 3.0, "time/step": 3.5}
    assert watch.lap() == {"time/step": 0.0}


def test_totals_go_on_after_a_restart(now):
    watch = Stopwatch()
    with watch.phase("update"):
        now[0] += 2.0
    watch.lap()
    again = Stopwatch(json.loads(json.dumps(watch.state)))
    now[0] += 1000.0
    again = Stopwatch(again.state)
    with again.phase("update"):
        now[0] += 1.0
    again.lap()
    assert again.state == {"update": 3.0, "step": 3.0}


def test_a_phase_that_fails_is_counted(now):
    watch = Stopwatch()
    with pytest.raises(ValueError), watch.phase("score"):
        now[0] += 1.0
        raise ValueError
    assert watch.state == {"score": 1.0}
