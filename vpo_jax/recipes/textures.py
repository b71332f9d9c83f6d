"""Videos that look like photographs to a filter: opaque disks of all sizes, one behind the other, with 1/f textures.

"Dead leaves" (Lee, Mumford and Huang 2001) have the edges, the heavy tails and the 1/f spectrum of natural images;
each leaf carries a piece of Gaussian 1/f noise. Everything is numpy and follows from a seed alone.
"""

import numpy as np

_LEAVES = 600
_SMALLEST, _LARGEST = 2.0, 60.0  # radius in pixels, density falling with the third power
_GRAIN = 12.0  # deviation of a leaf's texture, shades


def pink_noise(rng: np.random.Generator, size: int, exponent: float = 1.0) -> np.ndarray:
    """Gaussian noise whose amplitude falls as 1 / frequency^exponent: float64 [size, size], mean 0, deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = np.inf
    field = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(size, size))) / frequency**exponent, s=(size, size))
    return (field - field.mean()) / field.std()


def dead_leaves(seed: int, size: int) -> np.ndarray:
    """A still image, float32 [size, size, 3] in shades of 0 to 255."""
    rng = np.random.default_rng(seed)
    fine = 2 * size  # drawn twice as large: a pixel at an edge is a mixture
    image = np.zeros((fine, fine, 3))
    grain = np.stack([pink_noise(rng, fine) for _ in range(3)], axis=-1) * 0.3 + pink_noise(rng, fine)[..., None]
    # Inverse of the radius's distribution, 1 / r^3 between the two ends.
    low, high = _SMALLEST**-2, min(_LARGEST, size / 2) ** -2
    for radius in 2 * (low + rng.uniform(size=_LEAVES * size * size // 64**2) * (high - low)) ** -0.5:
        x, y = rng.uniform(-radius, fine + radius, 2)
        top, left = (max(0, int(place - radius)) for place in (y, x))
        window = image[top : max(0, int(y + radius) + 2), left : max(0, int(x + radius) + 2)]
        height, width = window.shape[:2]
        inside = (np.arange(height)[:, None] + top - y) ** 2 + (np.arange(width) + left - x) ** 2 < radius**2
        from_y, from_x = rng.integers(0, (fine - height + 1, fine - width + 1))
        part = grain[from_y : from_y + height, from_x : from_x + width]
        grey, tint = rng.uniform(20, 235), rng.normal(0, 25, 3)
        window[inside] = (grey + tint + _GRAIN * part)[inside]
    small = image.reshape(size, 2, size, 2, 3).mean((1, 3))
    return np.clip(small, 0, 255).astype(np.float32)


def moving_video(image: np.ndarray, size: int, frames: int, speed: float, angle: float = 0.5) -> np.ndarray:
    """A window of `size` pixels that glides over the image: uint8 [frames, size, size, 3].

    What is seen moves by `speed` pixels a frame against the window, along `angle` (radians); bilinear between pixels.
    """
    middle = (np.array(image.shape[:2]) - size) / 2
    video = []
    for frame in range(frames):
        along = (frame - (frames - 1) / 2) * speed
        top, left = middle + along * np.array([np.sin(angle), np.cos(angle)])
        y, x = int(np.floor(top)), int(np.floor(left))
        dy, dx = top - y, left - x
        corners = [image[y + i : y + i + size, x + j : x + j + size] for i in (0, 1) for j in (0, 1)]
        weights = [(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx]
        video.append(sum(w * c for w, c in zip(weights, corners, strict=True)))
    return np.round(np.clip(np.stack(video), 0, 255)).astype(np.uint8)
