"""The scorer's recipe on a handful of clips: it runs, resumes, writes a folder that scores."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.pipeline import load_pipeline
from vpo_jax.rewards.loading import load_scorer
from vpo_jax.rewards.protocol import DIMENSIONS
from vpo_jax.shapes import measure, train_scorer, train_videoscore, world
from vpo_jax.shapes import scorer_data as data


@pytest.fixture
def pools():
    rows = jnp.asarray(world.caption_indices("train"))
    clips = jax.jit(lambda key: data.make_clips(key, 16, rows, disturbed=False))(jax.random.key(0))
    return train_scorer.Pools(clips, clips, clips.videos, clips.rows)


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


@pytest.mark.parametrize("way", ["round_trip", "denoised"])
def test_carried_clips_keep_the_labels_of_what_went_in(way, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 4)
    pipeline = load_pipeline(str(model_folder))
    carried = data.carried_clips(pipeline, way, 5, 8, tmp_path)
    assert carried.videos.shape == (8, world.NUM_FRAMES, world.SIZE, world.SIZE, 3)
    assert carried.videos.dtype == np.uint8
    key = jax.random.split(jax.random.fold_in(jax.random.key(5), 1))[0]
    clips = data.make_clips(key, 4, jnp.asarray(world.caption_indices("train")), disturbed=False, soft=False)
    np.testing.assert_array_equal(np.asarray(carried.rows)[4:], np.asarray(clips.rows))
    np.testing.assert_allclose(np.asarray(carried.goodness)[4:], np.asarray(clips.goodness), atol=1e-6)
    assert not np.array_equal(np.asarray(carried.videos)[4:], np.asarray(clips.videos))
    assert np.all(np.asarray(clips.blur) == 0.0) and np.all(np.isfinite(carried.blur))
    assert len(list(tmp_path.glob("*.npz"))) == 2


def test_samples_of_the_base_follow_its_own_defaults(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 4)
    pipeline = load_pipeline(str(model_folder))
    videos, rows = data.base_samples(pipeline, "held_out", 3, 6, tmp_path)
    frames, height, width = pipeline.video_size()
    assert videos.shape == (6, frames, height, width, 3)
    np.testing.assert_array_equal(rows, world.caption_indices("held_out")[:6])


def test_spearman_gives_ties_their_mean_rank():
    assert measure.spearman(np.arange(5), np.arange(5) ** 3) == pytest.approx(1.0)
    assert measure.spearman(np.arange(5), -np.arange(5)) == pytest.approx(-1.0)
    # scipy.stats.spearmanr([1, 2, 2, 3], [1, 2, 3, 4])
    assert measure.spearman(np.array([1, 2, 2, 3]), np.array([1, 2, 3, 4])) == pytest.approx(0.9486832980505138)
    assert measure.spearman(np.zeros(4), np.arange(4)) == 0.0
