"""Scorers with devices of their own: the next candidates are made meanwhile, one step older, and nothing is lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "tests" / "programs" / "scorers_apart.py"


def test_scorers_apart_learn_from_candidates_one_step_old_and_resume_to_the_same_bits(tmp_path):
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(PROGRAM), str(Path(__file__).with_name("conftest.py")), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["calls"] == [4, 2] and found["interrupted"] and found["resumed"], found
    assert found["first_is_the_initial"] and found["second_is_not"] and found["without_is_newer"], found
    assert found["buffer"] == [3], found  # one step old at birth: max_pair_age=1 keeps no older ones
    assert found["jitted"] < 1e-4 and found["on"] == 2, found
