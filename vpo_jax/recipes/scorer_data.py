"""What the embedded world's scorer learns from: videos whose flaws are known because they were put there.

No judge labels anything here. Three sources: videos rendered with degradations of known strength; such videos carried
through the base model, which keep their labels and get its artefacts, the softness by comparison with what went in;
and the base model's own samples with one known degradation added, of which only the order is known.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.rewards.protocol import DIMENSIONS
from vpo_jax.shapes import world

# Labels leave room to both ends of the declared range, so that the sigmoid of the output is never flat there.
RANGE = (1.0, 4.0)
_LOWEST_LABEL, _HIGHEST_LABEL = 1.2, 3.8
_FASTEST = 2.2  # pixels a frame: full dynamic degree
_SHARP_EDGE = 0.35  # standard deviation of a clean edge's own width, pixels

QUALITY, CONSISTENCY, MOTION, ALIGNMENT, FACTS = range(len(DIMENSIONS))


class Labelled(NamedTuple):
    """Videos with what is known of them."""

    videos: jax.Array  # uint8 [B, F, H, W, 3]
    goodness: jax.Array  # float32 [B, 5] in [0, 1]; the column of the alignment is still to be asked for
    rows: jax.Array  # int32 [B], row of world.ALL_ATTRIBUTES
    freeze: jax.Array  # float32 [B]
    blur: jax.Array  # float32 [B], standard deviation in pixels of the blur that they have


def labels(goodness: jax.Array) -> jax.Array:
    """Goodness in [0, 1] on the scorer's scale."""
    return _LOWEST_LABEL + (_HIGHEST_LABEL - _LOWEST_LABEL) * goodness


# How often a video to learn from has flicker, jitter, blur, noise, freeze, morph; some videos have nothing at all.
_PRESENCE = (0.45, 0.45, 0.4, 0.3, 0.4, 0.4)
_NOTHING = 0.15


def sample_strengths(key: jax.Array, presence: Sequence[float] | None = None) -> world.Degradation:
    """Degradations to learn from: each often absent, with many weak ones, since fine differences matter most.

    `presence` gives the odds of the six kinds, independent of each other.
    """
    kinds, levels, clean = jax.random.split(key, 3)
    present = jax.random.uniform(kinds, (6,)) < jnp.array(presence or _PRESENCE)
    if presence is None:
        present &= jax.random.uniform(clean) > _NOTHING
    level = jnp.where(present, jax.random.uniform(levels, (6,)), 0.0)
    flicker, jitter, blur, noise, freeze, morph = level
    return world.Degradation(flicker**2, jitter**2, blur, noise**2, freeze, morph**1.5)


def goodness_of(scene: world.Scene, strengths: world.Degradation) -> jax.Array:
    """[5] in [0, 1] from the strengths that a video was made with, its natural unsteadiness included."""
    quality = quality_of(world.BLUR_SIGMA * strengths.blur, strengths.noise)

    # Uniform on [-1, 1] has a standard deviation of 1 / sqrt(3).
    exposure = jnp.hypot(strengths.flicker, scene.exposure * np.sqrt(3.0) / world.FLICKER_AMPLITUDE)
    shake = jnp.hypot(strengths.jitter, scene.shake / world.JITTER_STD)
    consistency = 1.0 - jnp.minimum(jnp.sqrt(exposure + 0.7 * shake), 1.0)

    motion = jnp.minimum(world.true_speed(scene, strengths) / _FASTEST, 1.0)
    facts = 1.0 - strengths.morph ** (2 / 3)
    return jnp.stack([quality, consistency, motion, jnp.ones_like(quality), facts])


def quality_of(blur: world.Number, noise: world.Number) -> jax.Array:
    """Visual quality in [0, 1] of a blur of this standard deviation in pixels and a noise of this strength."""
    sharpest, bluntest = _SHARP_EDGE, np.hypot(_SHARP_EDGE, world.BLUR_SIGMA)
    softer = (jnp.hypot(sharpest, blur) - sharpest) / (bluntest - sharpest)
    return jnp.maximum(1.0 - softer, 0.0) * (1.0 - jnp.sqrt(noise))


def soften(key: jax.Array, video: jax.Array, blur: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A video [F, H, W, 3] in [0, 1] with blur and grain added; its visual quality.

    `blur` is what the video already has, in pixels: the autoencoder's, which leaves no grain.
    """
    which, blur_key, noise_key, grain_key = jax.random.split(key, 4)
    present = jax.random.uniform(which, (2,)) < jnp.array([0.5, 0.25])
    added = jnp.where(present[0], world.BLUR_SIGMA * jax.random.uniform(blur_key), 0.0)
    noise = jnp.where(present[1], jax.random.uniform(noise_key) ** 2, 0.0)
    video = _blurred(video, added)
    video += world.NOISE_STD * noise * jax.random.normal(grain_key, video.shape)
    return jnp.clip(video, 0.0, 1.0), quality_of(jnp.hypot(blur, added), noise)


_BLURS = np.linspace(0.0, 2.0, 41)
_COARSE = 1.5  # blur in pixels that leaves the coarse gradients


def equivalent_blur(source: jax.Array, video: jax.Array) -> jax.Array:
    """Blur in pixels after which `source` is as soft as `video`, which was made of it: both [F, H, W, 3] -> scalar.

    Softness is the ratio of all squared gradients to those that a wide blur leaves: it follows neither the place of
    things nor their contrast, so that a video that came back moved or tinted is not called soft for it.
    """

    def crispness(video: jax.Array) -> jax.Array:
        return _squared_gradients(video) / (_squared_gradients(_blurred(video, _COARSE)) + 1e-6)

    blurs = jnp.asarray(_BLURS)
    falling = jax.vmap(lambda blur: crispness(_blurred(source, blur)))(blurs)
    return jnp.interp(crispness(video), falling[::-1], blurs[::-1])


def _squared_gradients(video: jax.Array) -> jax.Array:
    return jnp.square(jnp.diff(video, axis=1)).sum() + jnp.square(jnp.diff(video, axis=2)).sum()


def _blurred(video: jax.Array, sigma: world.Number) -> jax.Array:
    kernel = world.blur_matrix(sigma)
    return jnp.einsum("ij,fjkc,lk->filc", kernel, video, kernel)


def ask(key: jax.Array, row: jax.Array, freeze: jax.Array | float, fewest: int = 0) -> tuple[jax.Array, jax.Array]:
    """A caption for a video, right or with some attributes exchanged: (row of ALL_ATTRIBUTES, goodness in [0, 1]).

    `fewest` is the smallest number of exchanged attributes; the largest is four. A video that hardly moves
    contradicts any direction.
    """
    count_key, order_key, value_key = jax.random.split(key, 3)
    odds = jnp.where(jnp.arange(5) >= fewest, jnp.array([0.4, 0.27, 0.15, 0.1, 0.08]), 0.0)
    wrong = jax.random.categorical(count_key, jnp.log(odds))
    exchanged = jnp.argsort(jax.random.uniform(order_key, (5,))) < wrong
    sizes = jnp.array([len(values) for values in world.VALUES])
    step = 1 + jax.random.randint(value_key, (5,), 0, 1_000_000) % (sizes - 1)
    attributes = jnp.asarray(world.ALL_ATTRIBUTES)[row]
    asked = jnp.where(exchanged, (attributes + step) % sizes, attributes)
    places = jnp.array([int(np.prod(sizes_after)) for sizes_after in _TAILS])
    still = jnp.where(exchanged[3], 0.0, jnp.clip((freeze - 0.7) / 0.3, 0.0, 1.0))
    return (asked * places).sum(), (1.0 - jnp.minimum(wrong + still, 4.0) / 4.0) ** 1.4


_TAILS = [[len(values) for values in world.VALUES[i + 1 :]] for i in range(len(world.VALUES))]


def disturb(key: jax.Array, video: jax.Array) -> jax.Array:
    """What a generator does to a video and a label should not depend on: [F, H, W, 3] in [0, 1] -> the same.

    Tints, a coarser grid, and smooth stains, most of which stand still.
    """
    keys = jax.random.split(key, 8)
    gain = 1.0 + 0.08 * jax.random.uniform(keys[0], (3,), minval=-1.0)
    offset = 0.04 * jax.random.uniform(keys[1], (3,), minval=-1.0)
    video = video * gain + offset

    shape = video.shape
    coarse = video.reshape(shape[0], shape[1] // 2, 2, shape[2] // 2, 2, 3).mean((2, 4))
    coarse = jax.image.resize(coarse, shape, "linear")
    share = jnp.where(jax.random.uniform(keys[2]) < 0.3, 0.3 * jax.random.uniform(keys[3]), 0.0)
    video += share * (coarse - video)

    still = jax.image.resize(jax.random.normal(keys[4], (1, 8, 8, 3)), (1, *shape[1:]), "cubic")
    moving = jax.image.resize(jax.random.normal(keys[5], (shape[0], 8, 8, 3)), shape, "cubic")
    size = jax.random.uniform(keys[6], (2,)) ** 2 * (jax.random.uniform(keys[7], (2,)) < 0.5)
    return jnp.clip(video + 0.04 * size[0] * still + 0.015 * size[1] * moving, 0.0, 1.0)


def make_videos(key: jax.Array, count: int, rows: jax.Array, **how: Any) -> Labelled:
    """Freshly rendered videos of captions drawn from `rows`, with their labels; see `make_known_videos`; jittable."""
    return make_known_videos(key, count, rows, **how)[0]


# Of a frame; `make_known_videos` says in which units.
SHOWN = (
    *("x", "y", "radius", "red", "green", "blue"),
    *("background_red", "background_green", "background_blue", "exposure", "blur", "grain"),
    *world.SHAPES,
)


def make_known_videos(
    key: jax.Array,
    count: int,
    rows: jax.Array,
    disturbed: bool = True,
    soft: bool = True,
    presence: Sequence[float] | None = None,
) -> tuple[Labelled, jax.Array]:
    """Freshly rendered videos of captions drawn from `rows`, with their labels, and what their frames show; jittable.

    Without `soft` none is blurred or has grain. `presence` is that of `sample_strengths`. What frames show is float32
    [B, F, 15] in the order of `SHOWN`, numbers of order one.
    Place and radius of the object are from the frame's middle and from 6 pixels, in 8 and 2 pixels; colours are as
    exposed; of the shapes one is 1 and the others are -1.
    """

    def one(key: jax.Array) -> tuple[Labelled, jax.Array]:
        pick, scene_key, strength_key, render_key, disturb_key = jax.random.split(key, 5)
        row = rows[jax.random.randint(pick, (), 0, len(rows))]
        scene = world.sample_scene(scene_key, world.Attributes(*jnp.asarray(world.ALL_ATTRIBUTES)[row]))
        strengths = sample_strengths(strength_key, presence)
        if not soft:
            strengths = strengths._replace(blur=jnp.zeros(()), noise=jnp.zeros(()))
        video = world.render(scene, strengths, render_key)
        if disturbed:
            video = disturb(disturb_key, video)
        goodness, blur = goodness_of(scene, strengths), world.BLUR_SIGMA * jnp.asarray(strengths.blur)
        labelled = Labelled(world.to_uint8(video), goodness, row, jnp.asarray(strengths.freeze), blur)
        return labelled, _facts(scene, strengths, world.follow(scene, strengths, render_key))

    return jax.vmap(one)(jax.random.split(key, count))


def _facts(scene: world.Scene, strengths: world.Degradation, track: world.Track) -> jax.Array:
    every = jnp.ones(world.NUM_FRAMES)
    columns = [
        (track.centers - world.SIZE / 2) / 8.0,
        (track.radii[:, None] - 6.0) / 2.0,
        3.0 * world.expose(track.colors[:, None, None], track.exposure)[:, 0, 0] - 1.5,
        3.0 * world.expose(every[:, None, None, None] * scene.background, track.exposure)[:, 0, 0] - 1.5,
        4.0 * track.exposure[:, None],
        2.0 * every[:, None] * strengths.blur,
        2.0 * every[:, None] * jnp.sqrt(strengths.noise),
        every[:, None] * (2.0 * jax.nn.one_hot(scene.attributes.shape, len(world.SHAPES)) - 1.0),
    ]
    return jnp.concatenate(columns, axis=-1)


# The base model's samples, made worse in one known way.

EVERY_SPOIL = tuple(range(7))
FLICKER, JITTER, _WRONG_CAPTION = EVERY_SPOIL[0], EVERY_SPOIL[1], EVERY_SPOIL[-1]
_WEAKEST_ACROSS = 0.5
_SPOILED = np.array([CONSISTENCY, CONSISTENCY, QUALITY, QUALITY, MOTION, FACTS, ALIGNMENT])


def spoil(
    key: jax.Array, video: jax.Array, kind: jax.Array, weakest: jax.Array | float = 0.2
) -> tuple[jax.Array, jax.Array]:
    """A video [F, H, W, 3] in [0, 1] with degradation `kind` of a strength in [weakest, 1] added, and that strength.

    In order: flicker, jitter, blur, noise, slower motion, drifting colours; the last (6) leaves the video alone and
    means a wrong caption. `_SPOILED[kind]` is the dimension that must fall.
    """
    strength_key, key = jax.random.split(key)
    strength = jax.random.uniform(strength_key, minval=weakest)
    frames, size = video.shape[0], world.SIZE

    def flicker(video: jax.Array) -> jax.Array:
        change = jax.random.uniform(key, (frames,), minval=-1.0)
        return world.expose(video, world.FLICKER_AMPLITUDE * strength * change)

    def jitter(video: jax.Array) -> jax.Array:
        offsets = world.JITTER_STD * strength * jax.random.normal(key, (2, frames, 1, 1))
        place = jnp.arange(size, dtype=jnp.float32)
        source = jnp.clip(place[:, None] + offsets, 0.0, size - 1.0)  # [2, F, size, 1]
        rows, columns = jax.nn.relu(1.0 - jnp.abs(source - place))  # [F, size, size]
        return jnp.einsum("fij,fjkc,flk->filc", rows, video, columns)

    def blur(video: jax.Array) -> jax.Array:
        return _blurred(video, world.BLUR_SIGMA * strength)

    def noise(video: jax.Array) -> jax.Array:
        return video + world.NOISE_STD * strength * jax.random.normal(key, video.shape)

    def slower(video: jax.Array) -> jax.Array:
        middle = (frames - 1) / 2
        source = middle + (jnp.arange(frames) - middle) * (1.0 - strength)
        return video[jnp.round(source).astype(jnp.int32)]

    def drift(video: jax.Array) -> jax.Array:
        wave = 0.5 + 0.5 * jnp.sin(2 * jnp.pi * (jnp.arange(frames) / frames + jax.random.uniform(key)))
        share = (world.MORPH_COLOR * strength * wave).reshape(-1, 1, 1, 1)
        return video + share * (jnp.roll(video, 1, axis=-1) - video)

    changed = jax.lax.switch(kind, [flicker, jitter, blur, noise, slower, drift, lambda video: video], video)
    return jnp.clip(changed, 0.0, 1.0), strength


class Pairs(NamedTuple):
    """Samples of the base model, and the same or others made worse in one dimension."""

    better: jax.Array  # uint8 [B, F, H, W, 3]
    worse: jax.Array
    better_rows: jax.Array  # int32 [B], captions
    worse_rows: jax.Array
    dimension: jax.Array  # int32 [B]
    strength: jax.Array  # float32 [B] in [0.2, 1]


def make_pairs(
    key: jax.Array, count: int, videos: jax.Array, rows: jax.Array, kinds: Sequence[int] = EVERY_SPOIL
) -> Pairs:
    """Pairs from samples uint8 [N, F, H, W, 3] of the captions `rows`, the `kinds` of `spoil` in turn; jittable.

    In half of them the worse video is another sample, made so much worse that the two samples' own difference is
    small beside it: what a dimension means must not hang on colour, shape and size.
    """

    def one(number: jax.Array) -> Pairs:
        pick, spoil_key, ask_key = jax.random.split(jax.random.fold_in(key, number), 3)
        chosen, other = jax.random.randint(pick, (2,), 0, len(videos))
        kind = jnp.asarray(kinds)[number % len(kinds)]
        across = (number // len(kinds)) % 2 == 1
        source = jnp.where(across & (kind != _WRONG_CAPTION), other, chosen)
        weakest = jnp.where(across, _WEAKEST_ACROSS, 0.2)
        video, strength = spoil(spoil_key, videos[source].astype(jnp.float32) / 255.0, kind, weakest)
        # A sample may miss its caption in one attribute; with two or more exchanged it is still the better match.
        wrong, _ = ask(ask_key, rows[chosen], 0.0, fewest=2)
        row = jnp.where(kind == _WRONG_CAPTION, wrong, rows[source])
        return Pairs(videos[chosen], world.to_uint8(video), rows[chosen], row, jnp.asarray(_SPOILED)[kind], strength)

    return jax.vmap(one)(jnp.arange(count))
