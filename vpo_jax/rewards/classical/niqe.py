"""NIQE (Mittal, Soundararajan and Bovik 2013): how far a picture's local statistics lie from those of clean ones.

Luma less its local mean over its local deviation (MSCN) is close to a generalised Gaussian in clean pictures, and
changes with blur, noise and blocks. 18 parameters of its shape at each of two scales, taken from patches, are compared
with a Gaussian fitted to clean patches. As published, but for: patches of 32 pixels, so that small videos have one; the
patches of all frames of a video taken together; several clean models, of which the nearest counts.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammaln

from vpo_jax.rewards.classical.flow import gaussian, shrink

PATCH = 32  # pixels; half of it at the second scale
FEATURES = 36
ASSET = Path(__file__).resolve().parent / "assets" / "niqe.json"
_SIGMA = 7 / 6  # of the local window, 7 x 7
_SHAPES = np.geomspace(0.2, 10.0, 512).astype(np.float32)  # of a generalised Gaussian; 2 is the normal one, 1 Laplace's
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))  # down, right
_TINY = 1e-8


class Pristine(NamedTuple):
    """Clean patches' Gaussian, one a model.

    Attributes:
      mean: float32 [M, 36].
      whiten: float32 [M, 36, 36], with whiten @ covariance @ whiten.T = 1.
    """

    mean: np.ndarray
    whiten: np.ndarray


def fit_pristine(features: np.ndarray, least: float = 1e-3) -> tuple[np.ndarray, np.ndarray]:
    """Mean [36] and whitening matrix [36, 36] of clean patches' features [N, 36].

    Directions in which they vary by less than `least` of the largest (all in units of each feature's deviation) count
    as varying that much: nothing is divided by zero.
    """
    features = np.asarray(features, np.float64)
    mean, scale = features.mean(0), np.maximum(features.std(0), _TINY)
    values, vectors = np.linalg.eigh(np.cov((features - mean) / scale, rowvar=False))
    values = np.maximum(values, least * values.max())
    return mean.astype(np.float32), ((vectors / np.sqrt(values)).T / scale).astype(np.float32)


@functools.cache
def read_pristine() -> Pristine:
    """The shipped models, made by the command that stands in the file (`python -m vpo_jax.recipes.fit_niqe`)."""
    models = json.loads(ASSET.read_text(encoding="utf-8"))["models"]
    mean, whiten = (np.array([model[name] for model in models], np.float32) for name in ("mean", "whiten"))
    return Pristine(mean, whiten.reshape(-1, FEATURES, FEATURES))


def niqe(pristine: Pristine, luma: jax.Array) -> jax.Array:
    """Distance of a video's patches from the nearest clean model: luma [F, H, W] in shades -> scalar, 0 up.

    sqrt(d' ((S_clean + S_clip) / 2)^-1 d) with d the difference of the means; a single patch has S_clip = 0.
    """
    features = patch_features(luma)

    def distance(mean: jax.Array, whiten: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            white = (features - mean) @ whiten.T  # [P, 36]; clean ones have mean 0 and covariance 1
            middle = white.mean(0)
            spread = (white - middle).T @ (white - middle) / max(len(white) - 1, 1)
            return jnp.sqrt(middle @ jnp.linalg.solve((jnp.eye(FEATURES) + spread) / 2, middle))

    return jnp.min(jax.vmap(distance)(jnp.asarray(pristine.mean), jnp.asarray(pristine.whiten)))


def patch_features(luma: jax.Array) -> jax.Array:
    """The 36 parameters of every patch: luma [F, H, W] in shades of 0 to 255 -> float32 [F * patches, 36]."""
    height, width = (side // PATCH * PATCH for side in luma.shape[1:])
    luma = luma[:, :height, :width]
    scales = [(luma, PATCH), (shrink(luma, height // 2, width // 2), PATCH // 2)]
    return jnp.concatenate([_at_one_scale(*scale) for scale in scales], axis=-1)


def normalised_luma(luma: jax.Array) -> tuple[jax.Array, jax.Array]:
    """MSCN coefficients of [F, H, W], and the local deviation that they were divided by (plus one shade)."""
    mean = gaussian(luma, _SIGMA)
    deviation = jnp.sqrt(jnp.maximum(gaussian(jnp.square(luma), _SIGMA) - jnp.square(mean), 0.0))
    return (luma - mean) / (deviation + 1.0), deviation


def to_patches(images: jax.Array, size: int) -> jax.Array:
    """[F, H, W] of multiples of `size` -> [F * patches, size, size]."""
    frames, height, width = images.shape
    patches = images.reshape(frames, height // size, size, width // size, size)
    return patches.transpose(0, 1, 3, 2, 4).reshape(-1, size, size)


def _at_one_scale(luma: jax.Array, size: int) -> jax.Array:
    patches = to_patches(normalised_luma(luma)[0], size)
    shape, left, right = _asymmetric_gaussian(patches)
    columns = [shape, (left + right) / 2]
    for down, across in _NEIGHBOURS:
        shape, left, right = _asymmetric_gaussian(patches * jnp.roll(patches, (down, across), (1, 2)))
        mean = (right - left) * jnp.exp(gammaln(2 / shape) - gammaln(1 / shape))
        columns += [shape, mean, left, right]
    return jnp.stack(columns, axis=-1)


def _asymmetric_gaussian(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Shape, left and right width of [P, n, n], each [P], by moments (Lasmar, Stitou and Berthoumieu 2009)."""

    def root_mean_square(side: jax.Array) -> jax.Array:
        number = jnp.maximum(jnp.sum(side, axis=(1, 2)), 1)
        return jnp.sqrt(jnp.sum(jnp.where(side, jnp.square(x), 0.0), axis=(1, 2)) / number)

    left, right = root_mean_square(x < 0), root_mean_square(x > 0)
    ratio = (left + _TINY) / (right + _TINY)
    flatness = jnp.square(jnp.mean(jnp.abs(x), axis=(1, 2))) / (jnp.mean(jnp.square(x), axis=(1, 2)) + _TINY)
    flatness *= (ratio**3 + 1) * (ratio + 1) / jnp.square(jnp.square(ratio) + 1)
    a = jnp.asarray(_SHAPES)
    expected = jnp.exp(2 * gammaln(2 / a) - gammaln(1 / a) - gammaln(3 / a))  # rises with a
    shape = jnp.interp(flatness, expected, a)
    width = jnp.exp((gammaln(1 / shape) - gammaln(3 / shape)) / 2)
    return shape, left * width, right * width
