"""A run that is killed again and again ends where an uninterrupted one ends."""

import random
import signal
import subprocess
import time

import pytest

from tests.running import lines, start, weights, without_time

STEPS = "--config.train.steps=8"


def _ends_as_if_nothing_had_been(job, tmp_path, kills, seed):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    assert start(job, whole, STEPS).wait(timeout=300) == 0
    duration = time.monotonic() - began
    moments = random.Random(seed)
    for _ in range(kills):
        process = start(job, killed, STEPS)
        try:
            # Anywhere: start-up, rollout, score, update, save, export.
            process.wait(timeout=moments.uniform(0.1, 1.0) * duration)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    process = start(job, killed, STEPS)
    out = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert weights(killed) == weights(whole)
    assert [without_time(line) for line in lines(killed)] == [without_time(line) for line in lines(whole)]


def test_after_three_sigkills_at_random_moments_the_run_ends_bitwise_as_if_uninterrupted(finished, job, tmp_path):
    _ends_as_if_nothing_had_been(job, tmp_path, kills=3, seed=20261123)


@pytest.mark.long
def test_after_fifty_sigkills_at_random_moments_the_run_ends_bitwise_as_if_uninterrupted(finished, job, tmp_path):
    _ends_as_if_nothing_had_been(job, tmp_path, kills=50, seed=7)
