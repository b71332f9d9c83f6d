"""The classical judge falls with every degradation of known strength, and rises with motion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.recipes import textures
from vpo_jax.rewards.classical.flow import gaussian
from vpo_jax.rewards.classical.reward import RANGES
from vpo_jax.rewards.loading import load_rewards, load_scorer
from vpo_jax.rewards.protocol import Reward
from vpo_jax.runtime.errors import UserError
from vpo_jax.shapes import world

COUNT, SIZE = 4, 64


@pytest.fixture(scope="module")
def scorer():
    return load_scorer("classical")


@pytest.fixture(scope="module")
def images():
    return [textures.dead_leaves(1000 + i, 96) for i in range(COUNT)]


@pytest.fixture(scope="module")
def clips(images):
    """Textures that glide by one pixel a frame, float32 [4, 4, 64, 64, 3]."""
    return np.stack([textures.moving_video(image, SIZE, 4, 1.0) for image in images]).astype(np.float32)


def scores_of(scorer, steps, dimension):
    """[steps, clips] of one dimension."""
    to_uint8 = lambda x: np.round(np.clip(x, 0, 255)).astype(np.uint8)  # noqa: E731
    return np.stack([scorer(to_uint8(np.asarray(x)), [""] * len(x))[dimension] for x in steps])


def blurred(clips, sigma):
    return np.moveaxis(np.asarray(gaussian(jnp.moveaxis(jnp.asarray(clips), -1, 0), sigma)), 0, -1)


def noisy(clips, deviation):
    return clips + deviation * np.random.default_rng(0).normal(size=clips.shape)


def flickering(clips, shades):
    return clips + shades * np.array([1, -1, 1, -1])[None, :, None, None, None]


def greyer(clips, share):
    return clips + share * (clips.mean(-1, keepdims=True) - clips)


def blocky(clips, share):
    cut = clips.reshape(*clips.shape[:2], SIZE // 8, 8, SIZE // 8, 8, 3)
    return (clips.reshape(cut.shape) * (1 - share) + share * cut.mean((3, 5), keepdims=True)).reshape(clips.shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dimension", "degrade", "strengths"),
    [
        ("sharpness", blurred, (0.5, 1.0, 2.0, 3.0)),
        ("naturalness", blurred, (0.5, 1.0, 2.0, 3.0)),
        ("naturalness", noisy, (5.0, 10.0, 20.0, 40.0)),
        ("naturalness", blocky, (0.5, 0.75, 1.0)),
        ("warp_consistency", noisy, (2.0, 5.0, 10.0, 20.0, 40.0)),
        ("warp_consistency", flickering, (2.0, 5.0, 10.0, 20.0)),
        ("flicker_free", flickering, (2.0, 5.0, 10.0, 20.0)),
        ("colorfulness", greyer, (0.25, 0.5, 0.75, 1.0)),
    ],
)
def test_every_clip_falls_with_every_step_of_a_degradation(scorer, clips, dimension, degrade, strengths):
    scores = scores_of(scorer, [clips, *(degrade(clips, strength) for strength in strengths)], dimension)
    assert (np.diff(scores, axis=0) < 0).all(), scores.round(3)


@pytest.mark.parametrize("tone", [lambda x, s: x * s, lambda x, s: 255 - (255 - x) * s], ids=["darker", "brighter"])
def test_exposure_falls_on_the_way_to_black_and_to_white(scorer, clips, tone):
    # From half on: a bright clip is better exposed a little darker.
    assert (np.diff(scores_of(scorer, [tone(clips, s) for s in (0.5, 0.3, 0.1)], "exposure"), axis=0) < 0).all()


def test_dynamic_degree_is_the_speed_in_percent_of_the_diagonal(scorer, images):
    speeds = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0)
    steps = [np.stack([textures.moving_video(image, SIZE, 4, speed) for image in images]) for speed in speeds]
    scores = scores_of(scorer, steps, "dynamic_degree")
    true = 100 * np.array(speeds) / np.hypot(SIZE, SIZE)
    np.testing.assert_allclose(scores.mean(1), true, rtol=0.25, atol=0.02)
    assert (np.diff(scores, axis=0) > 0).all()


def test_noise_and_flicker_are_no_motion(scorer, images):
    still = np.stack([textures.moving_video(image, SIZE, 4, 0.0) for image in images]).astype(np.float32)
    assert (scores_of(scorer, [still], "dynamic_degree") == 0).all()
    # The slowest move above is 0.28 %.
    assert (scores_of(scorer, [noisy(still, 10.0), flickering(still, 20.0)], "dynamic_degree") < 0.05).all()


@pytest.fixture(scope="module")
def degraded():
    """`degraded(flicker=0.5)`: uint8 [8, 8, 32, 32, 3] of the shapes world, alike but for the degradation."""
    rows = world.caption_indices("tune")[:8]

    @jax.jit
    def render(degradation):
        def one(index, row):
            scene_key, key = jax.random.split(jax.random.fold_in(jax.random.key(0), index))
            scene = world.sample_scene(scene_key, world.Attributes(*jnp.asarray(world.ALL_ATTRIBUTES)[row]))
            return world.to_uint8(world.render(scene, degradation, key))

        return jax.vmap(one)(jnp.arange(len(rows)), rows)

    return lambda **strengths: render(world.Degradation()._replace(**strengths))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dimension", "degradation"),
    [
        ("flicker_free", "flicker"),
        ("warp_consistency", "flicker"),
        ("warp_consistency", "noise"),
        ("warp_consistency", "morph"),
        ("sharpness", "blur"),
        ("naturalness", "blur"),
        ("naturalness", "noise"),
        ("dynamic_degree", "freeze"),
    ],
)
def test_the_worlds_degradations_lower_what_they_should(scorer, degraded, dimension, degradation):
    scores = scores_of(scorer, [degraded(**{degradation: s}) for s in (0.0, 0.5, 1.0)], dimension)
    assert (np.diff(scores.mean(1)) < 0).all(), scores.mean(1)
    assert (scores[-1] < scores[0]).mean() >= 7 / 8


@pytest.mark.slow
def test_one_frame_has_still_values_and_any_size_from_32_pixels_works(scorer):
    frame = np.random.default_rng(0).integers(0, 256, (1, 1, 32, 45, 3), np.uint8)
    scores = scorer(frame, "")
    assert tuple(scores) == tuple(RANGES)
    assert scores["flicker_free"] == scores["warp_consistency"] == scores["dynamic_degree"] == 0
    assert all(np.isfinite(values).all() for values in scores.values())
    # Black, and the same in every frame: no measure divides by zero.
    assert all(np.isfinite(values).all() for values in scorer(np.zeros_like(frame), "").values())
    with pytest.raises(UserError, match=r"40x31 pixels are too few .* need 32 on each side"):
        scorer(np.zeros((1, 2, 31, 40, 3), np.uint8), "")


def test_it_judges_and_never_trains(scorer):
    assert isinstance(scorer.reward, Reward) and scorer.reward.jittable
    (judge,) = load_rewards("classical")
    assert judge.name == "classical" and not judge.trains
    with pytest.raises(UserError, match=r"classical is for evaluation only; name it in held_out\.scorers"):
        load_rewards("classical", training=True)
