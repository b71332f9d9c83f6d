"""Cores as devices: as many as divide the batch, and never against what a person has set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vpo_jax.runtime.backend import _cores

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, jax
from vpo_jax.runtime.backend import divide_cores
if sys.argv[1] == "late":
    jax.devices()
print(divide_cores(*map(int, sys.argv[2:])), len(jax.devices()))
"""


def devices(when, *batches, **environment):
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    command = [sys.executable, "-c", SCRIPT, when, *map(str, batches)]
    done = subprocess.run(
        command, cwd=ROOT, env=env | {"JAX_PLATFORMS": "cpu"} | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return tuple(map(int, done.stdout.split()))


@pytest.mark.parametrize("batches", [(16, 0, 0), (6, 3), (7,), (0, 0)])
def test_as_many_devices_as_cores_that_divide_every_batch(batches):
    most = max(n for n in range(1, _cores() + 1) if all(batch % n == 0 for batch in batches))
    assert devices("first", *batches) == (most, most)


def test_what_a_person_has_set_stays():
    assert devices("first", 16, XLA_FLAGS="--xla_force_host_platform_device_count=3") == (1, 3)
    assert devices("first", 16, JAX_NUM_CPU_DEVICES="4") == (1, 4)


def test_devices_that_are_there_already_stay():
    assert devices("late", 16) == (1, 1)
