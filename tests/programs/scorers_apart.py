"""Trains the toy model with scorers on devices of their own in the folder `argv[1]`; prints what it found, as JSON."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from tests.training import conftest as tiny
from vpo_jax.runtime.mesh import Meshes, make_mesh, split_devices
from vpo_jax.runtime.signals import Interrupted, Stop

home = Path(sys.argv[1])
devices, scoring = split_devices(2)
together = {"meshes": Meshes.of(make_mesh(devices=devices))}
apart = {"meshes": together["meshes"]._replace(score=make_mesh(devices=scoring))}


class Recorder(tiny.ToyReward):
    # Scores on the host, keeps what it saw, and may ask for a stop there.
    def score(self, params, videos, prepared):
        seen.append(np.array(videos))
        if len(seen) == stop_at:
            stop.signum = 15
        return np.asarray(super().score(params, videos, prepared))


def run(name, ask_stop_at=0, reward=None, options=apart, **overrides):
    global seen, stop, stop_at
    seen, stop, stop_at = [], Stop(), ask_stop_at
    count = 2 if options is apart else 0
    config = tiny.make_config(
        train__steps=4,
        preference__max_pair_age=1,
        reward__devices=count,
        checkpoint__every=2,
        optimizer__learning_rate=overrides.pop("rate", 0.05),
        **overrides,
    )
    rewards = (reward or Recorder(jittable=False),)
    return tiny.run_training(config, home / name, rewards=rewards, stop=stop, **options).state, seen


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


whole, ahead = run("whole")
_, still = run("still", rate=1e-30, options=together)
_, now = run("now", options=together)
try:
    run("stopped", 3)
    interrupted = False
except Interrupted:
    interrupted = True
resumed, later = run("stopped")
jitted, _ = run("jitted", reward=tiny.ToyReward())
looked, _ = run("looked", reward=tiny.ToyReward(), eval__every=2)
print(
    json.dumps(
        {
            "calls": [len(ahead), len(later)],
            "interrupted": interrupted,
            "resumed": same(resumed, whole),
            # Step 1's candidates come from the policy that nothing has trained yet; step 2's from the one of step 1.
            "first_is_the_start": np.array_equal(ahead[1], still[1]),
            "second_is_not": not np.array_equal(ahead[2], still[2]),
            "without_is_newer": not np.array_equal(now[1], still[1]),
            "buffer": sorted(set(np.asarray(whole.buffer.step).tolist())),
            "jitted": max(
                float(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max())
                for x, y in zip(jax.tree.leaves(jitted.policy), jax.tree.leaves(whole.policy), strict=False)
            ),
            "on": len(jitted.policy and jax.tree.leaves(jitted.policy)[0].sharding.device_set),
        }
    )
)
