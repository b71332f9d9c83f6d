"""The scorer's recipe on a handful of videos: it runs, resumes, writes a folder that scores."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.recipes import measure, train_scorer, train_videoscore
from vpo_jax.recipes import scorer_data as data
from vpo_jax.rewards.loading import load_scorer
from vpo_jax.rewards.protocol import DIMENSIONS
from vpo_jax.shapes import world


@pytest.fixture
def pools():
    rows = jnp.asarray(world.caption_indices("train"))
    labelled = jax.jit(lambda key: data.make_videos(key, 16, rows, disturbed=False))(jax.random.key(0))
    return train_scorer.Pools(labelled, labelled, labelled.videos, labelled.rows)


@pytest.mark.slow
def test_a_resumed_training_ends_bitwise_where_an_uninterrupted_one_does(pools, tmp_path, monkeypatch):
    monkeypatch.setattr(train_scorer, "WITH_BASE", train_scorer.Batch(fresh=2, round_trip=2, denoised=2, pairs=7))
    straight = train_scorer.train(0, 3, 1e-3, pools, tmp_path / "straight")
    with pytest.raises(TimeoutError, match="the same command goes on"):
        train_scorer.train(0, 3, 1e-3, pools, tmp_path / "stopped", seconds=0.0)
    resumed = train_scorer.train(0, 3, 1e-3, pools, tmp_path / "stopped")
    for a, b in zip(jax.tree.leaves(straight.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    train_scorer.write_scorer(tmp_path / "out", straight, {"recipe.json": {"seed": 0}})
    assert json.loads((tmp_path / "out" / "recipe.json").read_text()) == {"seed": 0}
    correlations = measure.synthetic_correlations(load_scorer(tmp_path / "out"), count=32)
    assert set(correlations) == set(DIMENSIONS)
    assert all(-1.0 <= value <= 1.0 for value in correlations.values())


@pytest.mark.parametrize("rule", [train_scorer.adamw, train_videoscore.muon])
def test_a_training_of_one_step_learns(rule, tmp_path):
    def loss(params, key, pools):
        value = jnp.square(params["x"] - 1.0).sum()
        return value, {"loss": value}

    def start():
        return {"x": jnp.zeros((2, 2))}

    found = train_scorer.optimise(loss, start, 0, 1, 1e-2, None, tmp_path, rule=rule)
    assert (np.asarray(found["x"]) > 0.001).all()


def test_spearman_gives_ties_their_mean_rank():
    assert measure.spearman(np.arange(5), np.arange(5) ** 3) == pytest.approx(1.0)
    assert measure.spearman(np.arange(5), -np.arange(5)) == pytest.approx(-1.0)
    # scipy.stats.spearmanr([1, 2, 2, 3], [1, 2, 3, 4])
    assert measure.spearman(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4])) == pytest.approx(0.9486832980505138)
    assert measure.spearman(np.zeros(4), np.arange(4)) == 0.0
