"""The renderer: captions, splits, degradations, randomness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.runtime.errors import UserError
from vpo_jax.shapes import judge, world


def test_splits_are_disjoint_and_cover_all_captions():
    parts = [world.captions(split) for split in ("train", "tune", "held_out")]
    assert [len(part) for part in parts] == [336, 48, 96]
    assert len({caption for part in parts for caption in part}) == 480


@pytest.mark.parametrize("split", ["train", "tune", "held_out"])
def test_every_value_of_an_attribute_comes_about_equally_often(split):
    attributes = world.ALL_ATTRIBUTES[world.caption_indices(split)]
    for column in attributes.T:
        counts = np.bincount(column)
        # The training split is what is left, and takes up the odd ones of both others.
        assert counts.max() - counts.min() <= (2 if split == "train" else 1)


def test_unknown_split_is_a_user_error():
    with pytest.raises(UserError, match="no split 'test'"):
        world.captions("test")


def test_a_caption_parses_back_to_its_attributes():
    for row in world.ALL_ATTRIBUTES:
        assert world.parse_caption(world.make_caption(row)) == tuple(row)
    assert world.parse_caption("a dog") is None
    assert world.make_caption((0, 0, 0, 0, 1)) == "a small red circle moving left on a gray background"


def test_a_video_does_not_depend_on_its_neighbours():
    rows = world.caption_indices("train")
    a = world.render_videos(jax.random.key(3), rows[:8], 0.5)
    b = world.render_videos(jax.random.key(3), np.concatenate([rows[:4], rows[20:24]]), 0.5)
    np.testing.assert_array_equal(np.asarray(a.frames[:4]), np.asarray(b.frames[:4]))
    assert not np.array_equal(np.asarray(a.frames[4]), np.asarray(b.frames[4]))


@pytest.mark.slow
def test_clean_objects_stay_inside_the_frame():
    videos = world.render_videos(jax.random.key(0), np.arange(480), 0.0)
    last = (world.NUM_FRAMES - 1) / 2
    for time in (-last, last):
        place = np.asarray(videos.scenes.center + time * videos.scenes.velocity)
        margin = np.minimum(place, world.SIZE - place) - np.asarray(videos.scenes.radius)[:, None]
        assert margin.min() > -0.1


def test_half_of_the_mixture_is_degraded_by_one_to_three():
    strengths = np.stack(jax.jit(jax.vmap(world.sample_degradation))(jax.random.split(jax.random.key(1), 4000)), axis=1)
    count = (strengths > 0).sum(axis=1)
    assert abs((count > 0).mean() - 0.5) < 0.03
    assert set(np.unique(count)) == {0, 1, 2, 3}
    assert strengths.max() <= 1.0 and strengths.min() >= 0.0
    assert len(np.unique(strengths[strengths > 0])) > 0.99 * (strengths > 0).sum()


def test_shapes_fill_their_share_of_the_bounding_box():
    for shape, share in enumerate((np.pi / 4, 1.0, 0.5)):
        axis = np.arange(32) + 0.5 - 16
        offset = np.stack(np.meshgrid(axis, axis), axis=-1)
        area = float(world._coverage(shape, offset, np.float32(7.6)).sum())
        # The distance field rounds the coverage of corner pixels, about one pixel in all.
        assert abs(area - share * 15.2**2) < 1.5


def test_frozen_videos_have_no_true_speed():
    videos = world.render_videos(jax.random.key(0), np.arange(4), 0.0)
    still = videos.degradations._replace(freeze=np.ones(4, np.float32))
    np.testing.assert_array_equal(np.asarray(world.true_speed(videos.scenes, still)), 0.0)
    assert (np.asarray(world.true_speed(videos.scenes, videos.degradations)) >= 1.39).all()


def test_crossings_go_straight_through_the_middle_at_one_speed() -> None:
    rows = world.caption_indices("train")[:16]
    videos = world.render_crossings(jax.random.key(0), jnp.asarray(rows))
    captions = [world.make_caption(world.ALL_ATTRIBUTES[row]) for row in rows]
    measures = judge.measure(np.asarray(world.to_uint8(videos.frames)), captions)
    np.testing.assert_allclose(measures["speed"], sum(world.SPEED_RANGE) / 2, atol=0.12)
    assert measures["direction"].max() < 0.1
    assert float(jnp.stack(videos.degradations).max()) == 0.0
