"""The analytic judge against videos whose truth is known by construction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.runtime.errors import UserError
from vpo_jax.shapes import judge, world

COUNT = 192


@functools.cache
def _renderer():
    def one(number, row, degradation):
        scene_key, render_key = jax.random.split(jax.random.fold_in(jax.random.key(7), number))
        scene = world.sample_scene(scene_key, world.Attributes(*jnp.asarray(world.ALL_ATTRIBUTES)[row]))
        return world.to_uint8(world.render(scene, degradation, render_key)), scene

    return jax.jit(jax.vmap(one, in_axes=(0, 0, None)))


def _videos(count=COUNT, split="held_out", **strengths):
    rows = np.resize(world.caption_indices(split), count)
    strengths = {name: np.float32(strengths.get(name, 0.0)) for name in world.Degradation._fields}
    videos, scenes = _renderer()(np.arange(count), rows, world.Degradation(**strengths))
    return np.asarray(videos), [world.make_caption(world.ALL_ATTRIBUTES[row]) for row in rows], scenes


@functools.cache
def _measured(name, strength):
    videos, captions, _ = _videos(**{name: strength})
    return judge.measure(videos, captions), judge.noise_level(videos), judge.overall(judge.measure(videos, captions))


@pytest.mark.slow
def test_clean_held_out_videos_match_their_captions():
    videos, captions, scenes = _videos()
    for name, found in judge.matches(videos, captions).items():
        assert found.mean() >= 0.99, name
    measures = judge.measure(videos, captions)
    speed = np.linalg.norm(scenes.velocity, axis=-1)
    # The natural unsteadiness of up to 0.1 pixels moves a line's slope over eight frames by about 0.02.
    assert np.abs(measures["speed"] - speed).max() < 0.1
    assert abs(judge.overall(measures).mean()) < 0.1


@pytest.mark.slow
def test_wrong_captions_are_found_out():
    videos, captions, _ = _videos()
    for position, name in enumerate(("size", "color", "shape", "direction", "background")):
        wrong = []
        for caption in captions:
            attributes = list(world.parse_caption(caption))
            attributes[position] = (attributes[position] + 1) % len(world.VALUES[position])
            wrong.append(world.make_caption(attributes))
        found = judge.matches(videos, wrong)
        assert found[name].mean() <= 0.01
        for other in found:
            assert other == name or found[other].mean() >= 0.99
        if name != "background":
            assert (judge.overall(judge.measure(videos, wrong)) < judge.overall(judge.measure(videos, captions))).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degradation", "name", "rises"),
    [
        ("flicker", "flicker", True),
        ("jitter", "jitter", True),
        ("blur", "sharpness", False),
        ("noise", "noise", True),
        ("freeze", "speed", False),
        ("morph", "color", True),
        ("morph", "size", True),
    ],
)
def test_each_measure_is_monotone_in_the_strength_of_its_degradation(degradation, name, rises):
    means = []
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        measures, noise, _ = _measured(degradation, strength)
        means.append(float((noise if name == "noise" else measures[name]).mean()))
    steps = np.diff(means)
    assert (steps > 0).all() if rises else (steps < 0).all(), means


@pytest.mark.parametrize("degradation", world.Degradation._fields)
def test_every_degradation_lowers_the_overall_score(degradation):
    scores = [_measured(degradation, strength)[2].mean() for strength in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert (np.diff(scores) < 0).all(), scores


def test_flicker_and_jitter_are_measured_apart():
    clean, flicker, jitter = (
        _measured(name, s)[0] for name, s in (("flicker", 0.0), ("flicker", 1.0), ("jitter", 1.0))
    )
    assert abs(flicker["jitter"].mean() - clean["jitter"].mean()) < 0.02
    assert abs(jitter["flicker"].mean() - clean["flicker"].mean()) < 0.002


@pytest.mark.slow
def test_the_training_mixture_is_far_from_clean_in_flicker_and_jitter():
    rows = np.resize(world.caption_indices("train"), 480)
    captions = [world.make_caption(world.ALL_ATTRIBUTES[row]) for row in rows]
    mixture = world.render_videos(jax.random.key(2), rows, 0.5)
    measures = judge.measure(np.asarray(world.to_uint8(mixture.frames)), captions)
    for name in ("flicker", "jitter"):
        assert measures[name].mean() > 5 * judge.CLEAN_MEAN[name]


@pytest.mark.slow
def test_the_clean_constants_are_what_clean_videos_give():
    measures = judge.measure_clean_videos(count=320, seed=1)
    for name, values in measures.items():
        # Twenty percent covers the sampling error of 320 videos for the widest measure, the flicker.
        np.testing.assert_allclose(values.mean(), judge.CLEAN_MEAN[name], rtol=0.2, err_msg=name)
    for name, values in judge.graded(measures).items():
        np.testing.assert_allclose(values.std(), judge.GRADED_STD[name], rtol=0.3, err_msg=name)


def test_empty_and_noisy_videos_get_finite_scores():
    captions = world.captions("tune")[:3]
    videos = np.zeros((3, 8, 32, 32, 3), np.uint8)
    videos[1] = 255
    videos[2] = np.random.RandomState(0).randint(0, 256, videos[2].shape)
    measures = judge.measure(videos, captions)
    assert all(np.isfinite(values).all() for values in measures.values())
    assert (judge.overall(measures) < -2).all()


def test_foreign_captions_and_shapes_are_user_errors():
    video = np.zeros((1, 8, 32, 32, 3), np.uint8)
    with pytest.raises(UserError, match="no caption of the shapes world"):
        judge.measure(video, ["a dog"])
    with pytest.raises(UserError, match="uint8"):
        judge.measure(video.astype(np.float32), world.captions("tune")[:1])
    with pytest.raises(UserError, match="2 for 1 videos"):
        judge.measure(video, world.captions("tune")[:2])
