"""Videos that the base model has made or altered, kept on disk in chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.pipeline import load_pipeline
from vpo_jax.recipes import base_videos
from vpo_jax.recipes import scorer_data as data
from vpo_jax.shapes import world


def test_chunks_on_disk_are_not_made_again(tmp_path):
    made = []

    def make(number):
        made.append(number)
        return {"x": np.full(2, number)}

    first = base_videos._kept(make, 3, tmp_path, "a")
    (tmp_path / "a_0001.npz").unlink()
    second = base_videos._kept(make, 3, tmp_path, "a")
    np.testing.assert_array_equal(first["x"], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(second["x"], first["x"])
    assert made == [0, 1, 2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["round_trip", "denoised"])
def test_carried_videos_keep_the_labels_of_what_went_in(way, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(base_videos, "_CHUNK", 4)
    pipeline = load_pipeline(str(model_folder))
    carried = base_videos.carried_videos(pipeline, way, 5, 8, tmp_path)
    assert carried.videos.shape == (8, world.NUM_FRAMES, world.SIZE, world.SIZE, 3)
    assert carried.videos.dtype == np.uint8
    key = jax.random.split(jax.random.fold_in(jax.random.key(5), 1))[0]
    labelled = data.make_videos(key, 4, jnp.asarray(world.caption_indices("train")), disturbed=False, soft=False)
    np.testing.assert_array_equal(np.asarray(carried.rows)[4:], np.asarray(labelled.rows))
    np.testing.assert_allclose(np.asarray(carried.goodness)[4:], np.asarray(labelled.goodness), atol=1e-6)
    assert not np.array_equal(np.asarray(carried.videos)[4:], np.asarray(labelled.videos))
    assert np.all(np.asarray(labelled.blur) == 0.0) and np.all(np.isfinite(carried.blur))
    assert len(list(tmp_path.glob("*.npz"))) == 2


@pytest.mark.slow
def test_samples_of_the_base_follow_its_own_defaults(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(base_videos, "_CHUNK", 4)
    pipeline = load_pipeline(str(model_folder))
    videos, rows = base_videos.base_samples(pipeline, "held_out", 3, 6, tmp_path)
    frames, height, width = pipeline.video_size()
    assert videos.shape == (6, frames, height, width, 3)
    np.testing.assert_array_equal(rows, world.caption_indices("held_out")[:6])
