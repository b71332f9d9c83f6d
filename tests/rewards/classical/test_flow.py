"""Optical flow: moves that are known, and what must not count as one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.recipes import textures
from vpo_jax.rewards.classical.flow import gaussian, optical_flow, shrink, warp, working_size

ANGLE = 0.5
_flow = jax.jit(optical_flow)


@pytest.fixture(scope="module")
def image():
    return textures.dead_leaves(3, 96)


def luma(clip):
    return clip.astype(np.float32).mean(-1)


@pytest.mark.slow
@pytest.mark.parametrize("speed", [0.5, 1.0, 2.0, 4.0])
def test_a_known_move_is_found(image, speed):
    first, second = luma(textures.moving_video(image, 64, 2, speed, ANGLE))
    flow = np.asarray(_flow(first, second))
    # The window glides one way, and what is seen moves the other.
    true = -speed * np.array([np.cos(ANGLE), np.sin(ANGLE)])
    errors = np.hypot(*(flow - true)[4:-4, 4:-4].T)
    # A tenth of a pixel, and a few places more that leave the frame or that alias at higher speeds.
    assert np.median(errors) < 0.1 + 0.03 * speed and errors.mean() < 0.1 + 0.06 * speed
    assert abs(np.hypot(*flow.T).mean() / speed - 1) < 0.15
    warped = np.asarray(warp(jnp.asarray(second), jnp.asarray(flow)))
    # At half a pixel most of the difference is that the two frames are interpolated differently.
    assert np.abs(warped - first).mean() < (0.6 if speed < 1 else 0.3) * np.abs(second - first).mean()


def test_nothing_that_stays_moves(image):
    still = luma(textures.moving_video(image, 64, 1, 0.0))[0]
    noise = np.random.default_rng(0).normal(0, 10, (2, 64, 64)).astype(np.float32)
    flat = np.full((64, 64), 90, np.float32)
    for first, second, most in [
        (still, still, 1e-6),
        (still, 0.5 * still + 20, 1e-3),  # exposure
        (still + noise[0], still + noise[1], 0.05),
        (flat, flat + 30, 1e-6),
        (flat + noise[0], flat + noise[1], 0.5),  # nothing but noise, stretched to full contrast
    ]:
        assert np.hypot(*np.asarray(_flow(first, second)).T).mean() < most


def test_a_blur_keeps_the_mean_and_the_working_size_its_bounds():
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 9, 11)), jnp.float32)
    np.testing.assert_allclose(gaussian(jnp.ones((3, 4)), 2.0), 1.0, atol=1e-6)
    assert gaussian(x, 1.0).shape == x.shape and shrink(x, 9, 11) is x
    assert working_size(32, 40) == (32, 40) and working_size(720, 1280) == (144, 256)
    assert working_size(32, 1000) == (32, 1000)
