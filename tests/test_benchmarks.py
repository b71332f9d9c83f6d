"""The embedded job's bars, cleared by a better model and missed by others; agreement of scorers with judges."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from vpo_jax.shapes import judge


def load(name):
    path = Path(__file__).resolve().parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def learning():
    return load("learning")


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


def test_agreement_is_within_prompts_and_blind_to_what_prompts_differ_in():
    agreement = load("agreement")
    rng = np.random.default_rng(0)
    own = rng.normal(size=(40, 4))
    prompts = 100 * rng.normal(size=(40, 1))
    assert agreement.within_prompts(own + prompts, own) > 0.999
    assert agreement.within_prompts(own + prompts, -own - prompts) < -0.999
    assert abs(agreement.within_prompts(rng.normal(size=(40, 4)) + prompts, own + prompts)) < 0.3
