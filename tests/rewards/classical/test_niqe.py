"""NIQE's parts against their definitions; that it falls with quality is shown in test_classical.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.recipes import fit_niqe, textures
from vpo_jax.rewards.classical import niqe

_features = jax.jit(niqe.patch_features)


def test_normalised_luma_is_the_published_one():
    ndimage = pytest.importorskip("scipy.ndimage")
    image = np.random.default_rng(0).uniform(0, 255, (40, 48)).astype(np.float32)
    blur = lambda x: ndimage.gaussian_filter(x.astype(np.float64), 7 / 6, mode="nearest", radius=4)  # noqa: E731
    mean = blur(image)
    deviation = np.sqrt(np.maximum(blur(image.astype(np.float64) ** 2) - mean**2, 0))
    found, spread = niqe.normalised_luma(jnp.asarray(image)[None])
    np.testing.assert_allclose(spread[0], deviation, rtol=1e-3)  # a difference of squares in float32
    np.testing.assert_allclose(found[0], (image - mean) / (deviation + 1), atol=2e-3)


@pytest.mark.parametrize("shape", [0.8, 1.0, 2.0, 4.0])
def test_moments_find_the_shape_of_a_generalised_gaussian(shape):
    scipy = pytest.importorskip("scipy")
    x = scipy.stats.gennorm.rvs(shape, size=(4, 128, 128), random_state=0)
    found, left, right = niqe._asymmetric_gaussian(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, shape, rtol=0.08)  # moments of 16,384 values
    np.testing.assert_allclose(left, 1.0, rtol=0.08)
    np.testing.assert_allclose(right, left, rtol=0.1)


def test_a_wider_right_side_is_told():
    x = np.random.default_rng(0).normal(size=(1, 128, 128))
    _, left, right = niqe._asymmetric_gaussian(jnp.asarray(np.where(x > 0, 3 * x, x), jnp.float32))
    assert 2.7 < right[0] / left[0] < 3.3


def test_clean_patches_have_mean_0_and_covariance_1_after_whitening():
    features = np.random.default_rng(0).normal(size=(500, 36)) * np.linspace(1, 9, 36) + 3
    mean, whiten = niqe.fit_pristine(features)
    white = (features - mean) @ whiten.T
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(white, rowvar=False), np.eye(36), atol=1e-3)


@pytest.mark.slow
def test_the_shipped_models_are_small_and_those_of_the_command_in_the_file():
    assert niqe.ASSET.stat().st_size < 100_000
    pristine = niqe.read_pristine()
    assert pristine.mean.shape == (2, 36) and pristine.whiten.shape == (2, 36, 36)
    # A few of the command's own images lie where the shipped model says.
    white = (fit_niqe.texture_features(images=4, size=64) - pristine.mean[0]) @ pristine.whiten[0].T
    assert np.abs(white.mean(0)).max() < 1.5 and 0.3 < white.std() < 2.0


@pytest.mark.slow
def test_every_patch_of_every_frame_counts_and_what_is_flat_is_finite():
    image = textures.dead_leaves(5, 96).mean(-1)
    assert _features(image[None, :, :70]).shape == (3 * 2, 36)
    features = np.asarray(_features(np.stack([image[:40, :40], np.full((40, 40), 9, np.float32)])))
    assert features.shape == (2, 36) and np.isfinite(features).all()
