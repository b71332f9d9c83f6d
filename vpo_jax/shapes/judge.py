"""The analytic judge: measures a video of the embedded world against its caption, without any learning.

It is used for neither training, nor labels, nor selection: it measures finished videos. Each frame is split into
background and object by colour, the object is followed through the video, and the three shapes are fitted to its
outline. `python -m vpo_jax.shapes.judge` prints the constants of clean videos that stand below.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.runtime.errors import UserError
from vpo_jax.shapes import world

MEASURES = ("flicker", "jitter", "speed", "direction", "color", "shape", "size", "sharpness")
HIGHER_IS_BETTER = {"speed": True, "shape": True, "sharpness": True} | dict.fromkeys(
    ("flicker", "jitter", "direction", "color", "size"), False
)

# Mean of the measures, and mean and standard deviation of their graded form, on clean videos of training captions,
# by `python -m vpo_jax.shapes.judge` (2,016 videos, seed 0). They fix the scale of `overall` and never change.
CLEAN_MEAN: dict[str, float] = {
    "flicker": 0.003379,
    "jitter": 0.07272,
    "speed": 1.749,
    "direction": 0.07161,
    "color": 0.04923,
    "shape": 1.933,
    "size": 0.03564,
    "sharpness": 1.128,
}
GRADED_MEAN: dict[str, float] = {
    "flicker": 5.069,
    "jitter": 1.97,
    "speed": 1.662,
    "direction": 1.985,
    "color": 2.334,
    "shape": 1.933,
    "size": 2.678,
    "sharpness": 1.09,
}
GRADED_STD: dict[str, float] = {
    "flicker": 0.3783,
    "jitter": 0.2904,
    "speed": 0.1135,
    "direction": 0.294,
    "color": 0.1808,
    "shape": 0.3991,
    "size": 0.2585,
    "sharpness": 0.05922,
}

_WINDOW = 24  # side of the window that follows the object, pixels
_RADII = np.geomspace(3.0, 10.0, 25)
_SOFTNESS = (1.2, 2.4, 4.0)  # width of a template's edge, pixels
_SHIFTS = (-0.4, 0.0, 0.4)
_PERIMETER = np.array([2 * np.pi, 8.0, 2 + 2 * np.sqrt(5.0)])  # of the three shapes, in radii
_CHUNK = 32  # videos measured in one compiled call


def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outlines to compare with: unit vectors [N, window * window], shape [N] and radius [N] of each.

    Every template stands with its centre of mass in the middle of the window, give or take the shifts.
    """
    axis = np.arange(_WINDOW) - (_WINDOW - 1) / 2
    rows, shapes, radii = [], [], []
    for shape, radius, soft, dx, dy in [
        (s, r, w, dx, dy) for s in range(3) for r in _RADII for w in _SOFTNESS for dx in _SHIFTS for dy in _SHIFTS
    ]:
        x = axis[None, :] - dx
        y = axis[:, None] - dy + (radius / 3 if shape == 2 else 0.0)
        distance = [
            np.sqrt(x * x + y * y) - radius,
            np.maximum(np.abs(x), np.abs(y)) - radius,
            np.maximum((2 * np.abs(x) - y - radius) / np.sqrt(5.0), y - radius),
        ][shape]
        row = np.clip(0.5 - distance / soft, 0.0, 1.0).reshape(-1)
        rows.append(row / np.linalg.norm(row))
        shapes.append(shape)
        radii.append(radius)
    return np.array(rows, np.float32), np.array(shapes), np.array(radii, np.float32)


def _smooth(images: jax.Array) -> jax.Array:
    """Binomial 3 x 3 blur over the last two axes."""
    for axis in (-2, -1):
        before, after = jnp.roll(images, 1, axis), jnp.roll(images, -1, axis)
        images = 0.25 * before + 0.5 * images + 0.25 * after
    return images


def _segment(frames: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Background colour [F, 3], object colour [F, 3] and how much of each pixel is object [F, H, W], unclipped."""
    edge = jnp.concatenate([frames[:, 0], frames[:, -1], frames[:, 1:-1, 0], frames[:, 1:-1, -1]], axis=1)
    background = jnp.median(edge, axis=1)  # [F, 3]
    change = frames - background[:, None, None]
    contrast = _smooth(jnp.linalg.norm(change, axis=-1))
    weight = jax.nn.relu(contrast - 0.7 * contrast.max(axis=(1, 2), keepdims=True))
    for _ in range(2):
        step = jnp.einsum("fhw,fhwc->fc", weight, change) / (weight.sum((1, 2))[:, None] + 1e-6)
        occupancy = jnp.einsum("fhwc,fc->fhw", change, step) / (jnp.sum(step * step, -1) + 1e-4)[:, None, None]
        smooth = _smooth(occupancy)
        weight = jnp.clip((smooth - 0.7 * smooth.max(axis=(1, 2), keepdims=True)) / 0.3, 0.0, 1.0)
    return background, background + step, occupancy


def _track(occupancy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Centre of the object [F, 2] as (x, y) in pixels, and the cleaned occupancy [F, H, W] in [0, 1]."""
    near = jax.lax.reduce_window(_smooth(occupancy), -jnp.inf, jax.lax.max, (1, 5, 5), (1, 1, 1), "SAME") > 0.45
    clean = jnp.where(near, jnp.clip((occupancy - 0.1) / 0.8, 0.0, 1.0), 0.0)
    # Linear in the occupancy: any threshold would make the centre wander with the phase of the edges.
    weight = jnp.where(near, jnp.clip(occupancy, 0.0, 1.0), 0.0)
    total = weight.sum((1, 2)) + 1e-6
    axis = jnp.arange(world.SIZE, dtype=jnp.float32) + 0.5
    return jnp.stack([(weight.sum(1) * axis).sum(1), (weight.sum(2) * axis).sum(1)], -1) / total[:, None], clean


def _follow(occupancy: jax.Array, centers: jax.Array) -> jax.Array:
    """Median over the frames of the occupancy in a window that moves with the object, [window, window]."""
    place = jnp.arange(_WINDOW) - (_WINDOW - 1) / 2
    axis = jnp.arange(world.SIZE) + 0.5
    rows = jax.nn.relu(1.0 - jnp.abs(centers[:, 1, None, None] + place[:, None] - axis))  # [F, window, H]
    columns = jax.nn.relu(1.0 - jnp.abs(centers[:, 0, None, None] + place[:, None] - axis))
    return jnp.median(jnp.einsum("fih,fhw,fjw->fij", rows, occupancy, columns), axis=0)


def _color_distance(color: jax.Array, named: jax.Array) -> jax.Array:
    """Distance in RGB that counts a change of brightness half, since exposure changes it."""
    change = color - named
    gray = change.mean(-1, keepdims=True)
    return jnp.sqrt(jnp.sum((change - gray) ** 2, -1) + 0.25 * 3 * gray[..., 0] ** 2)


def _measure_one(
    frames: jax.Array, attributes: world.Attributes, templates: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Measures, and what was found: float32 [F, H, W, 3] in [0, 1] against a caption's attributes."""
    background, color, occupancy = _segment(frames)
    centers, outline = _track(occupancy)

    time = jnp.arange(frames.shape[0]) - (frames.shape[0] - 1) / 2
    velocity = (time[:, None] * centers).sum(0) / (time**2).sum()
    rest = centers - centers.mean(0) - time[:, None] * velocity
    jitter = jnp.sqrt((rest**2).sum() / (frames.shape[0] - 2))
    speed = jnp.linalg.norm(velocity)
    heading = jnp.asarray(world.MOTION_VECTORS) @ velocity  # [4]
    angle = jnp.arccos(jnp.clip(heading[attributes.motion] / (speed + 1e-6), -1.0, 1.0))
    # Below 0.4 pixels a frame a direction means less and less, and a video that stands still has none.
    certain = jnp.clip(speed / 0.4, 0.0, 1.0)

    rows, shapes, radii = templates
    window = _follow(outline, centers).reshape(-1)
    fit = (rows @ window) / (jnp.linalg.norm(window) + 1e-6)  # [N], cosine of window and template
    best = jnp.argmax(fit)
    by_shape = jax.ops.segment_max(fit, shapes, 3)
    unexplained = 1.0 - by_shape**2 + 0.01
    others = jnp.where(jnp.arange(3) == attributes.shape, jnp.inf, unexplained).min()
    radius = radii[best]

    # A straight edge that takes w pixels from 0 to 1 has an integral of occupancy (1 - occupancy) of w / 6.
    edge = (outline * (1.0 - outline)).sum((1, 2)).mean()
    width = 6.0 * edge / (jnp.asarray(_PERIMETER, jnp.float32)[shapes[best]] * radius)

    distances = _color_distance(jnp.median(color, 0), jnp.asarray(world.COLOR_VALUES))
    measures = {
        "flicker": jnp.abs(jnp.diff(background.mean(-1))).mean(),
        "jitter": jitter,
        "speed": speed,
        "direction": certain * jnp.minimum(angle, 1.0) + (1.0 - certain),
        "color": distances[attributes.color],
        "shape": jnp.log(others / unexplained[attributes.shape]),
        "size": jnp.abs(jnp.log(radius / jnp.asarray(world.RADIUS_RANGES).mean(1)[attributes.size])),
        "sharpness": 1.0 / (width + 0.1),
    }
    middle = np.sqrt(world.RADIUS_RANGES[0].mean() * world.RADIUS_RANGES[1].mean())
    nearest_background = jnp.argmin(
        jnp.linalg.norm(jnp.median(background, 0) - jnp.asarray(world.BACKGROUND_VALUES), axis=-1)
    )
    found = {
        "color": jnp.argmin(distances) == attributes.color,
        "shape": jnp.argmax(by_shape) == attributes.shape,
        "size": (radius > middle) == (attributes.size == 1),
        "direction": (jnp.argmax(heading) == attributes.motion) & (speed > 0.3),
        "background": nearest_background == attributes.background,
    }
    return measures, found


@functools.cache
def _compiled() -> Callable[..., tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    rows, shapes, radii = _templates()
    templates = jnp.asarray(rows), jnp.asarray(shapes), jnp.asarray(radii)

    @jax.jit
    def run(videos: jax.Array, attributes: world.Attributes) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        frames = videos.astype(jnp.float32) / 255.0
        return jax.vmap(lambda f, a: _measure_one(f, a, templates))(frames, attributes)

    return run


def _run(videos: np.ndarray, captions: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    videos = np.asarray(videos)
    if videos.ndim != 5 or videos.shape[2:] != (world.SIZE, world.SIZE, 3) or videos.dtype != np.uint8:
        raise UserError(
            f"videos: the judge of the shapes world measures uint8 [B, F, {world.SIZE}, {world.SIZE}, 3], "
            f"not {videos.dtype} {list(videos.shape)}"
        )
    if len(videos) != len(captions):
        raise UserError(f"prompts: {len(captions)} for {len(videos)} videos; give one to each")
    parsed = [world.parse_caption(caption) for caption in captions]
    for caption, attributes in zip(captions, parsed, strict=True):
        if attributes is None:
            raise UserError(f"prompts: {caption!r} is no caption of the shapes world, which alone the judge reads")
    rows = np.array(parsed, np.int32)
    parts = []
    for start in range(0, len(videos), _CHUNK):
        # The last chunk is filled up with its own first video: one compiled shape for any number of videos.
        take = np.arange(start, start + _CHUNK)
        take = np.where(take < len(videos), take, start)
        part = _compiled()(videos[take], world.Attributes(*rows[take].T))
        count = min(_CHUNK, len(videos) - start)
        parts.append(jax.tree.map(lambda x, n=count: np.asarray(x)[:n], part))
    measures = {name: np.concatenate([part[0][name] for part in parts]) for name in MEASURES}
    found = {name: np.concatenate([part[1][name] for part in parts]) for name in parts[0][1]}
    return measures, found


def measure(videos: np.ndarray, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """The eight measures of videos against their captions: uint8 [B, F, 32, 32, 3] -> {name: float32 [B]}.

    flicker    mean change of the background's level between neighbouring frames, in [0, 1]; lower is better
    jitter     root mean square distance of the object from its own straight path, pixels; lower is better
    speed      pixels a frame along that path
    direction  angle between the path and the captioned direction, radians, at most 1; lower is better
    color      distance of the object's colour from the captioned one, brightness counted half; lower is better
    shape      log of how much worse the best other shape fits than the captioned one; higher is better
    size       distance of the fitted radius from the captioned size's middle, in logs; lower is better
    sharpness  inverse width of the object's edge, 1 / pixels; higher is better

    Raises:
      UserError: other shapes or types of video, or a caption that is not of this world.
    """
    return _run(videos, captions)[0]


def matches(videos: np.ndarray, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Whether color, shape, size, direction and background are the captioned ones: {name: bool [B]}.

    Each is the nearest of the values that the world knows; a video that stands still has no direction.
    """
    return _run(videos, captions)[1]


def noise_level(videos: np.ndarray) -> np.ndarray:
    """Standard deviation of fine grain in the flatter half of each video, in [0, 1]: uint8 -> float32 [B].

    Not one of the eight measures; it is what a score of visual quality is compared with besides sharpness.
    """
    x = np.asarray(videos, np.float32) / 255.0
    # The difference of the two diagonals is zero on every plane; its four terms double the deviation.
    grain = (x[:, :, 1:, 1:] - x[:, :, :-1, 1:] - x[:, :, 1:, :-1] + x[:, :, :-1, :-1]) / 2
    magnitude = np.abs(grain).reshape(len(x), -1)
    # Half of the absolute values of a Gaussian lie below 0.6745 standard deviations: edges do not count.
    return np.median(magnitude, axis=1) / np.float32(0.6745)


def graded(measures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The measures with higher better everywhere, and no reward for more than a clean video has.

    Errors e become -log(e + clean mean), so that the whole range from clean to hopeless spans about ten standard
    deviations of the clean videos for every measure; speed and sharpness count up to the clean mean.
    """
    result = {}
    for name in MEASURES:
        if not HIGHER_IS_BETTER[name]:
            result[name] = -np.log(measures[name] + CLEAN_MEAN[name])
        elif name == "shape":
            result[name] = measures[name]
        else:
            result[name] = np.minimum(measures[name], CLEAN_MEAN[name])
    return result


def in_clean_deviations(measures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`graded` as deviations from the clean videos' mean in units of their standard deviation: {name: float32 [B]}.

    Zero is a clean video's average, and higher is better.
    """
    return {name: (x - GRADED_MEAN[name]) / GRADED_STD[name] for name, x in graded(measures).items()}


def overall(measures: Mapping[str, np.ndarray]) -> np.ndarray:
    """One number a video, higher is better: the mean of the eight graded measures in clean deviations, [B]."""
    return np.mean(list(in_clean_deviations(measures).values()), axis=0)


def measure_clean_videos(count: int = 2016, seed: int = 0) -> dict[str, np.ndarray]:
    """The measures of clean videos of training captions: {name: float32 [count]}."""
    indices = np.resize(world.caption_indices("train"), count)
    videos = world.render_videos(jax.random.key(seed), indices, 0.0)
    names = [world.make_caption(world.ALL_ATTRIBUTES[index]) for index in indices]
    return measure(np.asarray(world.to_uint8(videos.frames)), names)


def _print_constants() -> None:
    def line(label: str, values: Mapping[str, np.ndarray], statistic: Callable[[np.ndarray], float]) -> None:
        print(label, "=", {name: float(f"{statistic(x):.4g}") for name, x in values.items()})

    measures = measure_clean_videos()
    CLEAN_MEAN.update({name: float(f"{x.mean():.4g}") for name, x in measures.items()})
    line("CLEAN_MEAN", measures, np.mean)
    line("GRADED_MEAN", graded(measures), np.mean)
    line("GRADED_STD", graded(measures), np.std)


if __name__ == "__main__":
    _print_constants()
