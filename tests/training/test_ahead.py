"""Scorers with devices of their own: the next candidates are made meanwhile, one step older, and nothing is lost."""

import json

import pytest

from tests.running import run_program


@pytest.mark.slow
@pytest.mark.parametrize("trunk_level", [0.0, 0.5])
def test_scorers_apart_learn_from_candidates_one_step_old_and_resume_to_the_same_bits(tmp_path, trunk_level):
    done = run_program("scorers_apart.py", tmp_path, str(trunk_level), devices=4, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["calls"] == [4, 2] and found["interrupted"] and found["resumed"], found
    assert found["first_is_the_initial"] and found["second_is_not"] and found["without_is_newer"], found
    assert found["buffer"] == [3], found  # one step old at birth: max_pair_age=1 keeps no older ones
    assert found["jitted"] < 1e-4 and found["on"] == 2, found
