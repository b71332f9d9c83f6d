"""The embedded world: short videos of one coloured shape that moves, with degradations of known strength.

Everything is pure `jax.numpy`, written for one video: `jax.vmap` makes batches and `jax.jit` makes them fast.
A caption names five attributes; the 480 of them are split once and for all into prompts to train on, to tune
on and to report on. Coordinates are pixels, x to the right, y downwards, with the frame spanning [0, 32].
"""

import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.runtime.errors import UserError

Number = jax.Array | np.ndarray | float  # traced or not, single or batched

NUM_FRAMES = 8  # where nothing else is said
SIZE = 32

SIZES = ("small", "large")
COLORS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("left", "right", "up", "down")
BACKGROUNDS = ("black", "gray", "white", "brown")

COLOR_VALUES = np.array(
    [[0.86, 0.16, 0.16], [0.16, 0.70, 0.24], [0.18, 0.32, 0.92], [0.94, 0.84, 0.18], [0.62, 0.22, 0.76]],
    np.float32,
)
BACKGROUND_VALUES = np.array(
    [[0.08, 0.08, 0.08], [0.50, 0.50, 0.50], [0.92, 0.92, 0.92], [0.44, 0.29, 0.17]], np.float32
)
MOTION_VECTORS = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]], np.float32)  # x, y
RADIUS_RANGES = np.array([[4.4, 5.2], [7.2, 8.0]], np.float32)  # half the side of the bounding box, pixels
SPEED_RANGE = (1.4, 2.1)  # pixels a frame: the fastest large object still stays inside the frame

# Full strength of each degradation.
FLICKER_AMPLITUDE = 0.6  # share of the way to white or black
JITTER_STD = 2.0  # pixels on each axis
BLUR_SIGMA = 1.6  # pixels
NOISE_STD = 0.14  # of the range of values
MORPH_GROWTH = 0.35  # log of the largest size over the middle one
MORPH_COLOR = 0.6  # share of the way to another colour

# The base model's training mixture: how often each degradation is one of a degraded video's, and its largest
# strength there. Frozen videos would teach a base that stands still, noise would waste its autoencoder.
_MIXTURE_WEIGHTS = np.array([0.30, 0.30, 0.16, 0.06, 0.06, 0.12], np.float32)
_MIXTURE_LARGEST = np.array([1.0, 1.0, 1.0, 0.4, 0.6, 1.0], np.float32)
_MIXTURE_COUNT = np.array([0.35, 0.40, 0.25], np.float32)  # one, two or three degradations


class Attributes(NamedTuple):
    """What a caption names: indices into SIZES, COLORS, SHAPES, MOTIONS and BACKGROUNDS, int32."""

    size: Number
    color: Number
    shape: Number
    motion: Number
    background: Number


class Degradation(NamedTuple):
    """Strengths in [0, 1], zero for a clean video."""

    flicker: Number = 0.0
    jitter: Number = 0.0
    blur: Number = 0.0
    noise: Number = 0.0
    freeze: Number = 0.0
    morph: Number = 0.0


class Scene(NamedTuple):
    """One clean video: what a caption leaves open."""

    attributes: Attributes
    radius: jax.Array  # pixels
    center: jax.Array  # [2], place in the middle of the video
    velocity: jax.Array  # [2], pixels a frame
    color: jax.Array  # [3]
    background: jax.Array  # [3]
    exposure: jax.Array  # natural change of exposure from frame to frame, standard deviation
    shake: jax.Array  # natural unsteadiness of the object, standard deviation in pixels


VALUES = (SIZES, COLORS, SHAPES, MOTIONS, BACKGROUNDS)
_CAPTION = re.compile(
    r"an? ({}) ({}) ({}) moving ({}) on an? ({}) background".format(*("|".join(values) for values in VALUES))
)
ALL_ATTRIBUTES = np.array(list(itertools.product(*(range(len(values)) for values in VALUES))), np.int32)  # [480, 5]
SPLITS = {"held_out": 96, "tune": 48, "train": 336}


def make_caption(attributes: Sequence[int] | np.ndarray) -> str:
    """Caption of (size, color, shape, motion, background) indices."""
    size, color, shape, motion, background = (v[int(i)] for v, i in zip(VALUES, attributes, strict=True))
    return f"a {size} {color} {shape} moving {motion} on a {background} background"


def parse_caption(caption: str) -> Attributes | None:
    """Attributes that a caption of this world names; None for any other text."""
    match = _CAPTION.fullmatch(caption.strip().lower().rstrip("."))
    if match is None:
        return None
    return Attributes(*(values.index(word) for values, word in zip(VALUES, match.groups(), strict=True)))


def _fill_balanced(order: np.ndarray, count: int) -> list[int] | None:
    """The first `count` captions of `order` in which an attribute's values come equally often, or one off."""
    room = [count // len(values) + (np.arange(len(values)) < count % len(values)) for values in VALUES]
    chosen: list[int] = []
    for index in order:
        if len(chosen) < count and all(r[v] for r, v in zip(room, ALL_ATTRIBUTES[index], strict=True)):
            chosen.append(int(index))
            for r, v in zip(room, ALL_ATTRIBUTES[index], strict=True):
                r[v] -= 1
    return chosen if len(chosen) == count else None


@functools.cache
def _splits() -> dict[str, np.ndarray]:
    for seed in itertools.count(20241217):
        order = np.random.RandomState(seed).permutation(len(ALL_ATTRIBUTES))
        split: dict[str, list[int] | None] = {"held_out": _fill_balanced(order, SPLITS["held_out"])}
        rest = order[~np.isin(order, split["held_out"] or [])]
        split["tune"] = _fill_balanced(rest, SPLITS["tune"])
        if split["held_out"] is not None and split["tune"] is not None:
            split["train"] = [int(index) for index in rest if index not in set(split["tune"])]
            return {name: np.array(indices, np.int32) for name, indices in split.items()}
    raise AssertionError("unreachable")


def caption_indices(split: str) -> np.ndarray:
    """Rows of ALL_ATTRIBUTES that belong to "train" (336), "tune" (48) or "held_out" (96), int32.

    Every value of every attribute comes equally often in "tune" and "held_out" (colours one off at most).

    Raises:
      UserError: unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"data.prompts: the shapes world has no split {split!r}; take train, tune or held_out")
    return _splits()[split].copy()


def captions(split: str) -> list[str]:
    """Captions of a split, in its fixed order; `caption_indices` gives their attributes."""
    return [make_caption(ALL_ATTRIBUTES[index]) for index in caption_indices(split)]


def sample_scene(key: jax.Array, attributes: Attributes, num_frames: int = NUM_FRAMES) -> Scene:
    """A clean video's natural variation: size, place, speed, heading and tints, as in `Scene`."""
    keys = jax.random.split(key, 8)
    low, high = jnp.asarray(RADIUS_RANGES)[attributes.size]
    radius = jax.random.uniform(keys[0], minval=low, maxval=high)
    speed = jax.random.uniform(keys[1], minval=SPEED_RANGE[0], maxval=SPEED_RANGE[1])
    heading = jax.random.uniform(keys[2], minval=-0.14, maxval=0.14)
    along = jnp.asarray(MOTION_VECTORS)[attributes.motion]
    across = jnp.stack([-along[1], along[0]])
    velocity = speed * (jnp.cos(heading) * along + jnp.sin(heading) * across)

    reach = radius + jnp.abs(velocity) * (num_frames - 1) / 2
    free = jnp.maximum(SIZE / 2 - reach, 0.0)
    center = SIZE / 2 + jax.random.uniform(keys[3], (2,), minval=-1.0) * free

    tint = jax.random.uniform(keys[4], (3,), minval=-0.06, maxval=0.06)
    shade = jax.random.uniform(keys[5], minval=-0.03, maxval=0.03)
    return Scene(
        attributes=attributes,
        radius=radius,
        center=center,
        velocity=velocity,
        color=jnp.clip(jnp.asarray(COLOR_VALUES)[attributes.color] + tint, 0.0, 1.0),
        background=jnp.clip(jnp.asarray(BACKGROUND_VALUES)[attributes.background] + shade, 0.0, 1.0),
        exposure=jax.random.uniform(keys[6], maxval=0.012),
        shake=jax.random.uniform(keys[7], maxval=0.10),
    )


def sample_degradation(key: jax.Array, probability: float | jax.Array = 0.5) -> Degradation:
    """The base model's training mixture: one to three continuous degradations with `probability`."""
    chosen_key, count_key, order_key, strength_key = jax.random.split(key, 4)
    scores = jnp.log(jnp.asarray(_MIXTURE_WEIGHTS)) + jax.random.gumbel(order_key, (6,))
    rank = jnp.argsort(jnp.argsort(-scores))
    count = 1 + jax.random.categorical(count_key, jnp.log(jnp.asarray(_MIXTURE_COUNT)))
    degraded = jax.random.uniform(chosen_key) < probability
    strength = jax.random.uniform(strength_key, (6,), minval=0.1) * jnp.asarray(_MIXTURE_LARGEST)
    return Degradation(*jnp.where(degraded & (rank < count), strength, 0.0))


def true_speed(scene: Scene, degradation: Degradation) -> jax.Array:
    """Pixels a frame that the object really moves."""
    return jnp.linalg.norm(scene.velocity, axis=-1) * (1.0 - degradation.freeze)


def _coverage(shape: Number, offset: jax.Array, radius: jax.Array) -> jax.Array:
    """Share of each pixel that the shape covers, from the signed distance to its edge.

    offset [H, W, 2] runs from the middle of the bounding box. Its half side is `radius` for all three shapes,
    so that they fill 0.785, 1 and 0.5 of it.
    """
    x, y = offset[..., 0], offset[..., 1]
    circle = jnp.sqrt(x * x + y * y + 1e-12) - radius
    square = jnp.maximum(jnp.abs(x), jnp.abs(y)) - radius
    # An upright isosceles triangle: its flanks fall two pixels for each pixel outwards.
    triangle = jnp.maximum((2.0 * jnp.abs(x) - y - radius) / np.sqrt(5.0).astype(np.float32), y - radius)
    distance = jnp.stack([circle, square, triangle])[shape]
    return jnp.clip(0.5 - distance, 0.0, 1.0)


def blur_matrix(sigma: Number) -> jax.Array:
    """Gaussian blur along one axis as a [SIZE, SIZE] matrix whose rows sum to one."""
    place = jnp.arange(SIZE, dtype=jnp.float32)
    weights = jnp.exp(-0.5 * ((place[:, None] - place[None, :]) / jnp.maximum(sigma, 1e-2)) ** 2)
    return weights / weights.sum(axis=1, keepdims=True)


def expose(frames: jax.Array, change: jax.Array) -> jax.Array:
    """Frames moved by `change` of the way to white (positive) or to black (negative)."""
    change = change.reshape(-1, 1, 1, 1)
    return jnp.where(change > 0, frames + change * (1.0 - frames), frames * (1.0 + change))


class Track(NamedTuple):
    """What each frame of a video shows, before blur, noise and whatever comes later."""

    centers: jax.Array  # [F, 2], pixels
    radii: jax.Array  # [F], pixels
    colors: jax.Array  # [F, 3]
    exposure: jax.Array  # [F], as `expose` takes it


def follow(scene: Scene, degradation: Degradation, key: jax.Array, num_frames: int = NUM_FRAMES) -> Track:
    """What the frames of one video show; `key` draws what the strengths leave to chance."""
    shake_key, jitter_key, exposure_key, flicker_key, _, morph_key = jax.random.split(key, 6)
    time = jnp.arange(num_frames, dtype=jnp.float32) - (num_frames - 1) / 2

    centers = scene.center + time[:, None] * scene.velocity * (1.0 - degradation.freeze)
    centers += scene.shake * jax.random.normal(shake_key, (num_frames, 2))
    centers += JITTER_STD * degradation.jitter * jax.random.normal(jitter_key, (num_frames, 2))

    phase_key, rate_key, other_key = jax.random.split(morph_key, 3)
    rate = jax.random.uniform(rate_key, minval=0.5, maxval=1.5)
    wave = jnp.sin(2 * jnp.pi * (rate * time / num_frames + jax.random.uniform(phase_key)))  # [F]
    radii = scene.radius * jnp.exp(MORPH_GROWTH * degradation.morph * wave)
    step = jax.random.randint(other_key, (), 1, len(COLORS))
    other = jnp.asarray(COLOR_VALUES)[(scene.attributes.color + step) % len(COLORS)]
    drift = MORPH_COLOR * degradation.morph * (0.5 + 0.5 * wave)
    colors = scene.color + drift[:, None] * (other - scene.color)

    flicker = jax.random.uniform(flicker_key, (num_frames,), minval=-1.0)
    exposure = scene.exposure * jax.random.normal(exposure_key, (num_frames,))
    exposure = jnp.clip(exposure + FLICKER_AMPLITUDE * degradation.flicker * flicker, -0.9, 0.9)
    return Track(centers, radii, colors, exposure)


def render(scene: Scene, degradation: Degradation, key: jax.Array, num_frames: int = NUM_FRAMES) -> jax.Array:
    """Frames of one video, float32 [F, H, W, 3] in [0, 1]; `key` draws what the strengths leave to chance."""
    track, noise_key = follow(scene, degradation, key, num_frames), jax.random.split(key, 6)[4]
    axis = jnp.arange(SIZE, dtype=jnp.float32) + 0.5
    grid = jnp.stack(jnp.meshgrid(axis, axis, indexing="xy"), axis=-1)  # [H, W, 2]
    coverage = jax.vmap(lambda center, radius: _coverage(scene.attributes.shape, grid - center, radius))(
        track.centers, track.radii
    )[..., None]  # [F, H, W, 1]
    frames = coverage * track.colors[:, None, None, :] + (1.0 - coverage) * scene.background

    kernel = blur_matrix(BLUR_SIGMA * degradation.blur)
    frames = jnp.einsum("ij,fjkc,lk->filc", kernel, frames, kernel)
    frames = expose(frames, track.exposure)
    frames += NOISE_STD * degradation.noise * jax.random.normal(noise_key, frames.shape)
    return jnp.clip(frames, 0.0, 1.0)


def to_uint8(frames: jax.Array) -> jax.Array:
    """[0, 1] to uint8, rounded to nearest."""
    return jnp.round(jnp.clip(frames, 0.0, 1.0) * 255.0).astype(jnp.uint8)


class Videos(NamedTuple):
    """A batch of rendered videos with everything that made them."""

    frames: jax.Array  # float32 [B, F, H, W, 3] in [0, 1]
    scenes: Scene
    degradations: Degradation


@functools.partial(jax.jit, static_argnames="num_frames")
def render_videos(
    key: jax.Array, indices: jax.Array, probability: float | jax.Array = 0.5, num_frames: int = NUM_FRAMES
) -> Videos:
    """Videos of the captions with these rows of ALL_ATTRIBUTES, each degraded with `probability`.

    indices int32 [B]. Video i depends on (key, i, indices[i]) alone, whatever the size of the batch.
    """

    def one(index: jax.Array, row: jax.Array) -> Videos:
        scene_key, degradation_key, render_key = jax.random.split(jax.random.fold_in(key, index), 3)
        scene = sample_scene(scene_key, Attributes(*jnp.asarray(ALL_ATTRIBUTES)[row]), num_frames)
        degradation = sample_degradation(degradation_key, probability)
        return Videos(render(scene, degradation, render_key, num_frames), scene, degradation)

    return jax.vmap(one)(jnp.arange(indices.shape[0]), indices)


@functools.partial(jax.jit, static_argnames="num_frames")
def render_crossings(key: jax.Array, indices: jax.Array, num_frames: int = NUM_FRAMES) -> Videos:
    """Clean videos that cross the middle of the frame straight and at one speed; arguments as `render_videos`."""

    def one(index: jax.Array, row: jax.Array) -> Videos:
        scene_key, render_key = jax.random.split(jax.random.fold_in(key, index))
        scene = sample_scene(scene_key, Attributes(*jnp.asarray(ALL_ATTRIBUTES)[row]), num_frames)
        along = jnp.asarray(MOTION_VECTORS)[scene.attributes.motion]
        scene = scene._replace(center=jnp.full(2, SIZE / 2), velocity=sum(SPEED_RANGE) / 2 * along)
        degradation = jax.tree.map(jnp.asarray, Degradation())
        return Videos(render(scene, degradation, render_key, num_frames), scene, degradation)

    return jax.vmap(one)(jnp.arange(indices.shape[0]), indices)
