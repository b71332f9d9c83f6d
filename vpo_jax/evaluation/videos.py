"""The videos of a comparison as files."""

from pathlib import Path

import numpy as np

from vpo_jax.evaluation.compare import Comparison
from vpo_jax.runtime.video import enlarge, write_mp4, write_webp

_GAP = 4  # pixels between videos that stand side by side


def write_videos(folder: str | Path, comparison: Comparison, fps: int = 8) -> None:
    """`base_0000.mp4` and `.webp` (without loss), `tuned_0000` likewise, for every prompt whose videos were kept.

    `side_by_side.webp` shows them all: base above, tuned below.
    """
    for who, videos in (("base", comparison.base_videos), ("tuned", comparison.tuned_videos)):
        for i, video in enumerate(videos):
            write_mp4(Path(folder) / f"{who}_{i:04d}.mp4", video, fps)
            write_webp(Path(folder) / f"{who}_{i:04d}.webp", video, fps)
    if len(comparison.base_videos):
        large = (np.stack([enlarge(v) for v in videos]) for videos in (comparison.base_videos, comparison.tuned_videos))
        write_webp(Path(folder) / "side_by_side.webp", side_by_side(*large), fps)


def side_by_side(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """One video of many: uint8 [N, F, H, W, 3] twice -> [F, 2 H + gap, N (W + gap) - gap, 3], white between them."""
    rows = []
    for videos in (above, below):
        padded = np.pad(videos, ((0, 0), (0, 0), (0, 0), (0, _GAP), (0, 0)), constant_values=255)
        rows.append(np.concatenate(list(padded), axis=2)[:, :, :-_GAP])
    gap = np.full_like(rows[0][:, :_GAP], 255)
    return np.concatenate([rows[0], gap, rows[1]], axis=1)
