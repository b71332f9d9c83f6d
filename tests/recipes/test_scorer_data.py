"""The scorer's training data: labels that follow from how a video was made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.recipes import measure
from vpo_jax.recipes import scorer_data as data
from vpo_jax.shapes import judge, world


def _goodness(**strengths):
    scene = world.render_videos(jax.random.key(0), np.arange(1), 0.0).scenes
    scene = jax.tree.map(lambda x: x[0], scene)
    strengths = {name: jnp.float32(strengths.get(name, 0.0)) for name in world.Degradation._fields}
    return np.asarray(data.goodness_of(scene, world.Degradation(**strengths)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("degradation", "dimension"),
    [
        ("blur", data.QUALITY),
        ("noise", data.QUALITY),
        ("flicker", data.CONSISTENCY),
        ("jitter", data.CONSISTENCY),
        ("freeze", data.MOTION),
        ("morph", data.FACTS),
    ],
)
def test_each_degradation_lowers_its_own_label_alone(degradation, dimension):
    levels = [_goodness(**{degradation: strength}) for strength in (0.0, 0.3, 0.6, 1.0)]
    others = [i for i in range(5) if i != dimension]
    assert (np.diff([level[dimension] for level in levels]) < 0).all()
    for level in levels:
        np.testing.assert_array_equal(level[others], levels[0][others])
        assert (level >= 0).all() and (level <= 1).all()


@pytest.mark.slow
def test_asked_captions_are_as_wrong_as_their_label_says():
    rows = jnp.asarray(np.resize(world.caption_indices("train"), 2000))
    asked, goodness = jax.vmap(data.ask, (0, 0, None))(jax.random.split(jax.random.key(1), 2000), rows, 0.0)
    wrong = (world.ALL_ATTRIBUTES[np.asarray(asked)] != world.ALL_ATTRIBUTES[np.asarray(rows)]).sum(1)
    np.testing.assert_allclose(np.asarray(goodness), (1 - wrong / 4) ** 1.4, atol=1e-6)
    assert 0.35 < (wrong == 0).mean() < 0.45
    assert wrong.max() == 4


@pytest.mark.slow
def test_a_wrong_caption_of_a_pair_has_two_attributes_exchanged_at_least():
    rows = jnp.asarray(world.caption_indices("train"))
    asked, _ = jax.vmap(lambda key, row: data.ask(key, row, 0.0, fewest=2))(
        jax.random.split(jax.random.key(1), len(rows)), rows
    )
    wrong = (world.ALL_ATTRIBUTES[np.asarray(asked)] != world.ALL_ATTRIBUTES[np.asarray(rows)]).sum(1)
    assert wrong.min() == 2


def test_a_frozen_video_contradicts_any_direction():
    right = [float(data.ask(jax.random.key(k), 7, 1.0)[1]) for k in range(12)]
    moving = [float(data.ask(jax.random.key(k), 7, 0.0)[1]) for k in range(12)]
    assert all(a <= b for a, b in zip(right, moving, strict=True))
    assert max(right) < 1.0 and max(moving) == 1.0


def test_only_training_captions_are_rendered():
    rows = world.caption_indices("train")
    labelled = jax.jit(lambda key: data.make_videos(key, 64, jnp.asarray(rows)))(jax.random.key(0))
    assert np.isin(np.asarray(labelled.rows), rows).all()
    assert labelled.videos.dtype == np.uint8


@pytest.mark.slow
def test_a_spoiled_sample_is_worse_in_its_dimension_by_the_judge():
    rows = world.caption_indices("train")[:42]
    clean = world.render_videos(jax.random.key(2), rows, 0.0)
    videos = world.to_uint8(clean.frames)
    pairs = jax.jit(lambda key: data.make_pairs(key, 70, videos, jnp.asarray(rows)))(jax.random.key(3))
    captions = [[world.make_caption(world.ALL_ATTRIBUTES[r]) for r in np.asarray(part)] for part in pairs[2:4]]
    better = judge.measure(np.asarray(pairs.better), captions[0])
    worse = judge.measure(np.asarray(pairs.worse), captions[0])
    kind = np.arange(70) % 7
    for number, (name, sign) in enumerate([("flicker", 1), ("jitter", 1), ("sharpness", -1), (None, 0), ("speed", -1)]):
        if name:
            # A weak blur leaves a sharp edge as it is, and a slow-down of 20 % rounds to whole frames.
            change = sign * (worse[name] - better[name])[kind == number]
            assert (change > -0.02).all() and change.mean() > 0.02, name
    noise = judge.noise_level(np.asarray(pairs.worse))[kind == 3]
    assert (noise > 0.01).all()
    same = np.asarray(pairs.better == pairs.worse).reshape(70, -1).all(1)
    assert same[kind == 6].all() and not same[kind < 4].any()
    matches = judge.matches(np.asarray(pairs.worse), captions[1])
    right = np.sum(list(matches.values()), axis=0)
    assert (right[kind == 6] <= 3).all()


@pytest.mark.slow
def test_pairs_of_chosen_kinds_alone():
    rows = world.caption_indices("train")[:8]
    videos = world.to_uint8(world.render_videos(jax.random.key(2), rows, 0.0).frames)
    make = jax.jit(lambda key: data.make_pairs(key, 6, videos, jnp.asarray(rows), kinds=(6, 2, 6)))
    pairs = make(jax.random.key(3))
    assert list(np.asarray(pairs.dimension)) == [data.ALIGNMENT, data.QUALITY, data.ALIGNMENT] * 2
    same = np.asarray(pairs.better == pairs.worse).reshape(6, -1).all(1)
    assert list(same) == [True, False, True] * 2


@pytest.mark.slow
def test_disturbances_keep_the_video_recognisable():
    rows = np.resize(world.caption_indices("train"), 64)
    videos = world.render_videos(jax.random.key(4), rows, 0.0)
    changed = jax.jit(jax.vmap(data.disturb))(jax.random.split(jax.random.key(5), 64), videos.frames)
    captions = [world.make_caption(world.ALL_ATTRIBUTES[row]) for row in rows]
    for name, found in judge.matches(np.asarray(world.to_uint8(changed)), captions).items():
        assert found.mean() > 0.9, name


@pytest.mark.slow
def test_softened_videos_are_softer_and_grainier_by_the_judge_the_lower_their_quality():
    rows = jnp.asarray(world.caption_indices("train"))
    labelled = data.make_videos(jax.random.key(1), 96, rows, disturbed=False, soft=False)
    assert float(jnp.abs(labelled.goodness[:, data.QUALITY] - 1.0).max()) < 1e-6
    frames = labelled.videos.astype(jnp.float32) / 255.0
    softened, quality = jax.vmap(data.soften)(jax.random.split(jax.random.key(2), 96), frames, labelled.blur)
    captions = [world.make_caption(world.ALL_ATTRIBUTES[row]) for row in np.asarray(labelled.rows)]
    videos = np.asarray(world.to_uint8(softened))
    grain = judge.noise_level(videos)
    plain = grain < 0.002
    assert 0.5 < plain.mean() < 0.95 and np.asarray(quality).min() < 0.3
    sharpness = judge.measure(videos, captions)["sharpness"]
    assert measure.spearman(sharpness[plain], np.asarray(quality)[plain]) > 0.8
    assert np.asarray(quality)[~plain].mean() < np.asarray(quality)[plain].mean()


@pytest.mark.slow
@pytest.mark.parametrize("change", ["nothing", "exposure", "place"])
def test_equivalent_blur_is_the_blur_that_a_video_caught_wherever_and_however_bright_it_came_back(change):
    rows = jnp.asarray(world.caption_indices("train"))
    labelled = data.make_videos(jax.random.key(4), 24, rows, disturbed=False, soft=False)
    source = labelled.videos.astype(jnp.float32) / 255.0
    blurs = jnp.linspace(0.25, 1.4, 24)  # a narrower kernel does not reach the next pixel
    back = jax.vmap(data._blurred)(source, blurs)
    if change == "exposure":
        back = 0.2 + 0.6 * back
    if change == "place":
        back = jnp.roll(back, 1, axis=2)
    found = jax.vmap(data.equivalent_blur)(source, back)
    # A shift carries some objects over the border, where they leave an edge that was not there.
    off = np.abs(np.asarray(found - blurs))
    assert (np.median(off) if change == "place" else off.max()) < 0.03


@pytest.mark.slow
def test_facts_are_what_the_frames_show():
    rows = jnp.asarray(world.caption_indices("train"))
    presence = (1.0, 1.0, 0.0, 0.0, 0.0, 1.0)  # flicker, jitter, morph
    make = jax.jit(lambda key: data.make_known_videos(key, 32, rows, False, True, presence))
    labelled, facts = make(jax.random.key(9))
    frames, facts = np.asarray(labelled.videos) / 255.0, np.asarray(facts)
    shown = {name: facts[..., i] for i, name in enumerate(data.SHOWN)}
    assert not shown["blur"].any() and not shown["grain"].any()
    checked = 0
    for video in range(32):
        for frame in range(world.NUM_FRAMES):
            x, y = (16.0 + 8.0 * shown[axis][video, frame] for axis in "xy")
            radius = 6.0 + 2.0 * shown["radius"][video, frame]
            if not (radius < x < 32 - radius and radius < y < 32 - radius):
                continue
            image, checked = frames[video, frame], checked + 1
            background = [(shown[f"background_{c}"][video, frame] + 1.5) / 3.0 for c in ("red", "green", "blue")]
            color = [(shown[c][video, frame] + 1.5) / 3.0 for c in ("red", "green", "blue")]
            corner = image[-1 if y < 16 else 0, -1 if x < 16 else 0]
            np.testing.assert_allclose(corner, background, atol=0.003)
            np.testing.assert_allclose(image[int(y), int(x)], color, atol=0.003)
            covered = np.abs(image - corner).sum(-1) > 0.5 * np.abs(np.subtract(color, corner)).sum()
            assert covered.any(0).sum() == pytest.approx(2 * radius, abs=2.1)  # a triangle's corners are thin
    assert checked > 100
    light = frames.mean((2, 3, 4))
    apart = [(x - x.mean(1, keepdims=True)).ravel() for x in (shown["exposure"], light)]
    assert np.corrcoef(*apart)[0, 1] > 0.8
