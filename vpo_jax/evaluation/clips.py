"""The clips of a comparison as files."""

from pathlib import Path

from vpo_jax.evaluation.compare import Comparison
from vpo_jax.runtime.video import write_mp4, write_webp


def write_clips(folder: str | Path, comparison: Comparison, fps: int = 8) -> None:
    """`base_0000.mp4` and `.webp` (without loss), `tuned_0000` likewise, for every prompt whose clips were kept."""
    for who, videos in (("base", comparison.base_videos), ("tuned", comparison.tuned_videos)):
        for i, video in enumerate(videos):
            write_mp4(Path(folder) / f"{who}_{i:04d}.mp4", video, fps)
            write_webp(Path(folder) / f"{who}_{i:04d}.webp", video, fps)
