"""Classical measures without weights and without a reference, as a scorer of any videos for evaluation only."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.rewards.classical.flow import LEAST, optical_flow, shrink, warp, working_size
from vpo_jax.rewards.classical.niqe import Pristine, niqe, read_pristine
from vpo_jax.rewards.protocol import PyTree
from vpo_jax.runtime.errors import UserError

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_WELL_EXPOSED = 0.2  # deviation of Mertens' bell around middle grey, of the range of values

# What each measure usually lies between; the ends are no limits.
RANGES: Mapping[str, tuple[float, float]] = {
    "flicker_free": (-50.0, 0.0),
    "warp_consistency": (-50.0, 0.0),
    "dynamic_degree": (0.0, 10.0),
    "sharpness": (0.0, 4.0),
    "colorfulness": (0.0, 120.0),
    "exposure": (0.0, 1.0),
    "naturalness": (-60.0, 0.0),
}


def flicker_free(videos: jax.Array) -> jax.Array:
    """Minus how far a frame's mean colour is from that of its two neighbours' middle, shades: [F, H, W, 3] -> scalar.

    A steady change of light, or something that comes in, is no flicker. Fewer than three frames cannot flicker: 0.
    """
    means = videos.mean((1, 2))  # [F, 3]
    if len(means) < 3:
        return jnp.zeros(())
    return -jnp.abs(means[1:-1] - (means[:-2] + means[2:]) / 2).mean()


def motion(luma: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Warp consistency and dynamic degree of luma [F, H, W], both by optical flow from each frame to the next.

    Warp consistency is minus the mean difference, in shades, between a frame and the next one warped back onto it
    (Lai and others 2018, without their mask): what is neither still nor moves. Dynamic degree is the mean length of
    the flow in percent of the frame's diagonal. Both are taken at `working_size`. One frame: both 0.
    """
    if len(luma) < 2:
        return jnp.zeros(()), jnp.zeros(())
    luma = shrink(luma, *working_size(*luma.shape[1:]))

    def of_pair(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first, second = pair
        flow = optical_flow(first, second)
        length = jnp.sqrt(jnp.sum(jnp.square(flow), axis=-1))
        return jnp.abs(warp(second, flow) - first).mean(), length.mean()

    error, length = jax.lax.map(of_pair, (luma[:-1], luma[1:]))
    return -error.mean(), 100.0 * length.mean() / math.hypot(*luma.shape[1:])


def sharpness(luma: jax.Array) -> jax.Array:
    """log10(1 + variance of the Laplacian) (Pech-Pacheco and others 2000), mean over frames: [F, H, W] -> scalar.

    Noise counts as detail here; `naturalness` tells it apart.
    """
    inner = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    return jnp.log10(1.0 + jnp.var(around - 4 * inner, axis=(1, 2))).mean()


def colorfulness(videos: jax.Array) -> jax.Array:
    """The third measure of Hasler and Suesstrunk (2003), mean over frames: [F, H, W, 3] -> scalar.

    0 is grey, 15 slightly, 33 moderately, 59 quite and 109 extremely colourful, by their observers.
    """
    red, green, blue = jnp.moveaxis(videos, -1, 0)
    opponents = jnp.stack([red - green, (red + green) / 2 - blue])  # [2, F, H, W]
    spread, offset = (jnp.sqrt(jnp.sum(x, axis=0)) for x in (opponents.var((2, 3)), jnp.square(opponents.mean((2, 3)))))
    return (spread + 0.3 * offset).mean()


def exposure(luma: jax.Array) -> jax.Array:
    """Mean of exp(-(y - 1/2)^2 / (2 0.2^2)) over pixels, y luma in [0, 1] (Mertens and others 2007): in (0, 1]."""
    return jnp.exp(-0.5 * jnp.square((luma / 255.0 - 0.5) / _WELL_EXPOSED)).mean()


def measure(video: jax.Array, pristine: Pristine) -> dict[str, jax.Array]:
    """Every measure of one video, uint8 [F, H, W, 3]; higher is better. `naturalness` is minus NIQE."""
    pixels = video.astype(jnp.float32)
    luma = jnp.sum(pixels * LUMA, axis=-1)
    consistency, dynamic = motion(luma)
    return {
        "flicker_free": flicker_free(pixels),
        "warp_consistency": consistency,
        "dynamic_degree": dynamic,
        "sharpness": sharpness(luma),
        "colorfulness": colorfulness(pixels),
        "exposure": exposure(luma),
        "naturalness": -niqe(pristine, luma),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class ClassicalReward:
    """The measures of `measure` on videos of any size from 32 pixels and any number of frames; see `Reward`.

    They measure how a video looks, not whether it shows what the prompt says. A frozen, smooth video is steady: read
    `flicker_free` and `warp_consistency` beside `dynamic_degree`.
    """

    name: str = "classical"
    dimensions: tuple[str, ...] = tuple(RANGES)
    ranges: tuple[tuple[float, float], ...] = tuple(RANGES.values())
    trains: bool = False
    jittable: bool = True
    videos_at_a_time: int = 8
    params: Pristine = dataclasses.field(default_factory=read_pristine)

    def frame_indices(self, num_frames: int) -> tuple[int, ...]:
        """All frames: flicker and flow are differences of neighbours."""
        return tuple(range(num_frames))

    def prepare(self, prompts: Sequence[str]) -> np.ndarray:
        """Nothing of the prompts is read: float32 [P, 0]."""
        return np.zeros((len(prompts), 0), np.float32)

    def score(self, params: Pristine, videos: jax.Array | np.ndarray, prepared: PyTree) -> jax.Array:
        """uint8 [P * N, F, H, W, 3] -> float32 [P * N, 7].

        Raises:
          UserError: a side below 32 pixels.
        """
        if min(videos.shape[2:4]) < LEAST:
            raise UserError(
                f"videos: {videos.shape[3]}x{videos.shape[2]} pixels are too few for the classical measures, which "
                f"need {LEAST} on each side; give larger videos"
            )
        one: Callable[[jax.Array], jax.Array] = lambda video: jnp.stack(list(measure(video, params).values()))  # noqa: E731
        return jax.lax.map(one, jnp.asarray(videos))
