"""A run that is killed again and again ends where an uninterrupted one ends."""

import random
import signal
import subprocess
import time

import pytest

from tests.running import lines, start, weights, without_time

STEPS = "--config.train.steps=8"


def _ends_as_if_nothing_had_been(job, tmp_path, kills, seed):
    """A run that gets to its end before there were `kills` is held to the whole one, and another begins."""
    whole = tmp_path / "whole"
    began = time.monotonic()
    assert start(job, whole, STEPS).wait(timeout=300) == 0
    duration = time.monotonic() - began
    moments = random.Random(seed)
    runs = 1
    while kills:
        killed = tmp_path / f"killed_{runs}"
        process = start(job, killed, STEPS)
        try:
            # Anywhere: start-up, rollout, score, update, save, export.
            code = process.wait(timeout=moments.uniform(0.1, 1.0) * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills -= 1
            metrics = killed / "metrics.jsonl"
            done = metrics.read_text().count("\n") if metrics.exists() else 0
            print(f"{kills} kills to go; run {runs} had {done} steps", flush=True)
        else:
            assert code == 0, process.communicate()
            _assert_same(killed, whole)
            runs += 1
    killed = tmp_path / f"killed_{runs}"
    process = start(job, killed, STEPS)
    out = process.communicate(timeout=300)
    assert process.returncode == 0, out
    _assert_same(killed, whole)


def _assert_same(killed, whole):
    assert weights(killed) == weights(whole)
    assert [without_time(line) for line in lines(killed)] == [without_time(line) for line in lines(whole)]


@pytest.mark.slow
def test_after_three_sigkills_at_random_moments_the_run_ends_bitwise_as_if_uninterrupted(finished, job, tmp_path):
    _ends_as_if_nothing_had_been(job, tmp_path, kills=3, seed=20261123)


@pytest.mark.long
def test_after_fifty_sigkills_at_random_moments_the_run_ends_bitwise_as_if_uninterrupted(finished, job, tmp_path):
    _ends_as_if_nothing_had_been(job, tmp_path, kills=50, seed=7)
