"""The bars of the embedded job: cleared by a model that is better, missed by one that is worse or that stands still."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from vpo_jax.shapes import judge


@pytest.fixture(scope="module")
def learning():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "learning.py"
    spec = importlib.util.spec_from_file_location("learning", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scores_of(rng, gain=0.0, steadier=1.0, slower=1.0):
    """96 prompts, one sample: a scorer, the judge's grades, and its measures at ten times a clean clip's."""
    noise = rng.normal(size=(96, 1))
    found = dict.fromkeys(("shapes/visual_quality", "shapes/dynamic_degree", "judge/overall"), noise + gain)
    found |= {f"judge/{name}": noise + gain for name in judge.MEASURES}
    clean = {name: np.full((96, 1), 10 * judge.CLEAN_MEAN[name]) for name in judge.MEASURES}
    clean["flicker"], clean["jitter"] = clean["flicker"] * steadier, clean["jitter"] * steadier
    clean["speed"] = clean["speed"] / slower
    return found | {f"raw/{name}": values for name, values in clean.items()}


TRAINED = ("shapes/visual_quality", "shapes/dynamic_degree")


def test_a_better_model_clears_every_bar(learning):
    base, tuned = (scores_of(np.random.default_rng(0), **more) for more in ({}, {"gain": 0.5, "steadier": 0.7}))
    found = learning.bars(base, tuned, TRAINED)
    assert len(found) == 7 and all(cleared for _, _, cleared in found), found
    assert "-30.0%" in found[2][1]


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"gain": 0.0, "steadier": 0.7}, {0, 1}),
        ({"gain": 0.5, "steadier": 0.8}, {2}),
        ({"gain": 0.5, "steadier": 0.7, "slower": 1.2}, {3}),
        ({"gain": -0.5, "steadier": 0.7}, {0, 1, 4, 5, 6}),
    ],
)
def test_each_bar_can_be_missed(learning, change, missed):
    base, tuned = (scores_of(np.random.default_rng(0), **more) for more in ({}, change))
    found = learning.bars(base, tuned, TRAINED)
    assert {i for i, (_, _, cleared) in enumerate(found) if not cleared} == missed, found
