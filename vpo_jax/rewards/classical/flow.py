"""Optical flow between two frames: Lucas and Kanade (1981) from coarse to fine, in pure jnp, without weights."""

import jax
import jax.numpy as jnp
import numpy as np

LEAST = 32  # pixels of the shorter side that a measure of motion or detail needs
WORKING = 256  # larger frames are shrunk to this longer side first: motion is a share of the frame anyway
_COARSEST = 12  # pixels of the shorter side below which the pyramid does not go
_ITERATIONS = 4  # a level
_WINDOW = 2.0  # standard deviation of the Gaussian window, pixels
_DAMPING = 0.05  # of the structure tensor, in squared deviations a squared pixel: flat places do not move
_EVIDENCE = 3.0  # standard deviation of the window in which motion has to explain the difference, pixels
_SURE, _DOUBTFUL = 0.3, 0.6  # share of the squared difference that warping leaves: full motion below, none above
_SMALL_DIFFERENCE = 2e-4  # squared deviations, the rounding to 8 bits: less than this is no evidence of motion
_LEAST_CONTRAST = 4.0  # shades: a frame with less than this is not stretched to full contrast


def gaussian(images: jax.Array, sigma: float) -> jax.Array:
    """Gaussian blur of [..., H, W], edges repeated; the window reaches three standard deviations."""
    radius = int(np.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (images.ndim - 2, images.ndim - 1):
        size = images.shape[axis]
        widths = [(radius, radius) if i == axis else (0, 0) for i in range(images.ndim)]
        padded = jnp.pad(images, widths, mode="edge")
        parts = (w * jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i, w in enumerate(weights))
        images = sum(parts, jnp.zeros_like(images))
    return images


def shrink(images: jax.Array, height: int, width: int) -> jax.Array:
    """[..., H, W] smoothly resized to [..., height, width]; the same array where nothing changes."""
    if images.shape[-2:] == (height, width):
        return images
    return jax.image.resize(images, (*images.shape[:-2], height, width), "linear", antialias=True)


def working_size(height: int, width: int) -> tuple[int, int]:
    """The size at which motion is measured: at most WORKING on the longer side, at least LEAST on the shorter."""
    scale = min(1.0, max(WORKING / max(height, width), LEAST / min(height, width)))
    return round(height * scale), round(width * scale)


def warp(image: jax.Array, flow: jax.Array) -> jax.Array:
    """The image [H, W] read at x + flow(x), bilinear, edges repeated; flow [H, W, 2] in pixels (x, y)."""
    height, width = image.shape
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    places = [rows + flow[..., 1], columns + flow[..., 0]]
    return jax.scipy.ndimage.map_coordinates(image, places, order=1, mode="nearest")


def optical_flow(first: jax.Array, second: jax.Array) -> jax.Array:
    """Where each pixel of the first frame has gone in the second.

    Each frame is set to mean 0 and deviation 1 first, so that a change of exposure is no motion. On every level motion
    counts only where it explains the difference between the frames, so that neither noise nor flat places move.

    Args:
      first, second: luma, float32 [H, W] in shades of 0 to 255, at least LEAST pixels on each side.

    Returns:
      float32 [H, W, 2], pixels to the right and downwards.
    """
    levels = [jnp.stack([_stretched(first), _stretched(second)])]
    while min(levels[-1].shape[-2:]) // 2 >= _COARSEST:
        height, width = levels[-1].shape[-2:]
        levels.append(shrink(levels[-1], height // 2, width // 2))
    flow = jnp.zeros((*levels[-1].shape[-2:], 2), jnp.float32)
    for pair in reversed(levels):
        height, width = pair.shape[-2:]
        scale = np.array([width / flow.shape[1], height / flow.shape[0]], np.float32)
        flow = jax.image.resize(flow, (height, width, 2), "linear") * scale
        flow = _refine(pair[0], pair[1], flow)
    return flow


def _stretched(frame: jax.Array) -> jax.Array:
    return (frame - frame.mean()) / jnp.maximum(frame.std(), _LEAST_CONTRAST)


def _refine(first: jax.Array, second: jax.Array, flow: jax.Array) -> jax.Array:
    first, second = gaussian(first, 0.8), gaussian(second, 0.8)

    def iterate(flow: jax.Array, _: None) -> tuple[jax.Array, None]:
        warped = warp(second, flow)
        # Slopes of both frames' mean: noise in one frame is then uncorrelated with the difference of the two.
        down, right = jnp.gradient((first + warped) / 2)
        change = warped - first
        products = jnp.stack([right * right, right * down, down * down, right * change, down * change])
        xx, xy, yy, xt, yt = gaussian(products, _WINDOW)
        xx, yy = xx + _DAMPING, yy + _DAMPING
        determinant = xx * yy - xy * xy
        step = jnp.stack([xy * yt - yy * xt, xy * xt - xx * yt], axis=-1) / determinant[..., None]
        return flow + jnp.clip(step, -1.0, 1.0), None

    flow = jax.lax.scan(iterate, flow, None, length=_ITERATIONS)[0]
    differences = jnp.square(jnp.stack([warp(second, flow), second]) - first)
    left, before = gaussian(differences, _EVIDENCE) + _SMALL_DIFFERENCE
    return flow * jnp.clip((_DOUBTFUL - left / before) / (_DOUBTFUL - _SURE), 0.0, 1.0)[..., None]
