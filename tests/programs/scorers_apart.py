"""Trains the toy model with scorers on devices of their own; prints what it found, as JSON.

The arguments are a folder and rollout.trunk_level.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from tests.training import conftest as tiny
from vpo_jax.runtime.mesh import Meshes, make_mesh, split_devices
from vpo_jax.runtime.signals import Interrupted, Stop


class Recorder(tiny.ToyReward):
    """Scores on the host, keeps what it saw, and may ask for a stop there."""

    def __init__(self, seen, stop, stop_at):
        super().__init__(jittable=False)
        for name, value in {"seen": seen, "stop": stop, "stop_at": stop_at}.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def score(self, params, videos, prepared):
        """The toy's scores."""
        self.seen.append(np.array(videos))
        if len(self.seen) == self.stop_at:
            self.stop.signum = 15
        return np.asarray(super().score(params, videos, prepared))


def run(folder, meshes, stop_at=0, reward=None, rate=0.05, **overrides):
    """(the state after four steps, the videos that were scored)."""
    seen, stop = [], Stop()
    config = tiny.make_config(
        train__steps=4, preference__max_pair_age=1, reward__devices=2 if meshes.apart else 0, checkpoint__every=2,
        optimizer__learning_rate=rate, rollout__trunk_level=float(sys.argv[2]), rollout__num_inference_steps=4,
        **overrides,
    )  # fmt: skip
    rewards = (reward or Recorder(seen, stop, stop_at),)
    return tiny.run_training(config, folder, rewards=rewards, stop=stop, meshes=meshes).state, seen


def is_same(a, b):
    """Whether two trees hold the same bits."""
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def main(home):
    """Prints the findings."""
    devices, scoring = split_devices(2)
    together = Meshes.of(make_mesh(devices=devices))
    apart = together._replace(score=make_mesh(devices=scoring))
    whole, ahead = run(home / "whole", apart)
    _, still = run(home / "still", together, rate=1e-30)
    _, now = run(home / "now", together)
    try:
        run(home / "stopped", apart, stop_at=3)
        interrupted = False
    except Interrupted:
        interrupted = True
    resumed, later = run(home / "stopped", apart)
    jitted, _ = run(home / "jitted", apart, reward=tiny.ToyReward())
    run(home / "looked", apart, reward=tiny.ToyReward(), eval__every=2)
    found = {
        "calls": [len(ahead), len(later)],
        "interrupted": interrupted,
        "resumed": is_same(resumed, whole),
        # Step 1's candidates come from the policy that nothing has trained yet; step 2's from the one of step 1.
        "first_is_the_initial": np.array_equal(ahead[1], still[1]),
        "second_is_not": not np.array_equal(ahead[2], still[2]),
        "without_is_newer": not np.array_equal(now[1], still[1]),
        "buffer": sorted(set(np.asarray(whole.algorithm.buffer.step).tolist())),
        "jitted": max(
            float(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max())
            for x, y in zip(jax.tree.leaves(jitted.policy), jax.tree.leaves(whole.policy), strict=True)
        ),
        "on": len(jax.tree.leaves(jitted.policy)[0].sharding.device_set),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
