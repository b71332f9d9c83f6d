"""Scores of video files.

python -m vpo_jax.score --scorer=NAME_OR_DIR --videos=GLOB [--prompts=FILE] --output=FILE
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vpo_jax.data.prompt_files import match_videos
from vpo_jax.data.prompts import load_prompt_file
from vpo_jax.rewards.loading import load_scorer
from vpo_jax.rewards.scoring import Scorer
from vpo_jax.runtime import cli
from vpo_jax.runtime.backend import keep_compiled_programs, keep_freed_memory
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.files import write_text_atomically
from vpo_jax.runtime.paths import check_output_file, find_files
from vpo_jax.runtime.video import SUFFIXES, read_video

FORMATS = (".json", ".jsonl", ".csv")
BATCH = 32  # videos in memory at a time


def main(argv: Sequence[str]) -> None:
    """Scores what the flags name."""
    parser = cli.Parser("vpo_jax.score", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--scorer", required=True, help="shapes, classical, judge, a folder, or MODULE:FUNCTION")
    parser.add_argument("--videos", required=True, help="pattern of files, quoted; ** goes into folders")
    parser.add_argument("--prompts", default="", help="a prompt for each video: by file name, or in their order")
    parser.add_argument("--output", required=True, help="a .json, .jsonl or .csv file")
    parser.add_argument(
        "--every_pixel", type=int, default=1, help="keep one pixel of K x K: undoes how small videos are enlarged"
    )
    flags = parser.parse(argv)
    output = check_output_file(flags.output, "--output", FORMATS)
    if flags.every_pixel < 1:
        raise UserError(f"--every_pixel: {flags.every_pixel} must be 1 or more")
    paths = find_videos(flags.videos)
    prompts = prompts_of(flags.prompts, paths)
    keep_compiled_programs()
    keep_freed_memory()
    scorer = load_scorer(flags.scorer, "--scorer")
    rows = score_files(scorer, paths, prompts, flags.every_pixel)
    write_rows(output, rows)
    print(f"{len(rows)} videos, {'with' if flags.prompts else 'without'} prompts: {output}")
    for dimension in scorer.reward.dimensions:
        values = [row[dimension] for row in rows if row[dimension] is not None]
        print(f"  {dimension:<26} {np.mean(values):.4g}" if values else f"  {dimension:<26} none")


def find_videos(pattern: str) -> list[str]:
    """Video files that the pattern names, in natural order (2.mp4 before 10.mp4)."""
    paths = find_files(pattern, "--videos")
    for path in paths:
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"--videos: {path}: not a video file; give one of {', '.join(SUFFIXES)}")
    return [str(path) for path in paths]


def prompts_of(source: str, paths: Sequence[str]) -> list[str]:
    """The prompt of each video: by file name where the file gives names, else by position; "" without a file."""
    if not source:
        return [""] * len(paths)
    file = load_prompt_file(source, "--prompts")
    return match_videos(file, [Path(path) for path in paths], "--prompts")


def score_files(
    scorer: Scorer, paths: Sequence[str], prompts: Sequence[str], every_pixel: int = 1
) -> list[dict[str, Any]]:
    """{"video", "prompt", dimension: score or None} of each file, in order; neighbours of one size go together."""
    rows: list[dict[str, Any]] = [{"video": path, "prompt": text} for path, text in zip(paths, prompts, strict=True)]
    pending: list[np.ndarray] = []
    first = 0

    def score_pending() -> None:
        nonlocal first
        last = first + len(pending)
        for name, values in scorer(np.stack(pending), prompts[first:last]).items():
            for row, value in zip(rows[first:last], values, strict=True):
                row[name] = float(value) if np.isfinite(value) else None
        pending.clear()
        first = last

    for path in paths:
        video = read_video(path)[:, ::every_pixel, ::every_pixel]
        if pending and (len(pending) == BATCH or pending[0].shape != video.shape):
            score_pending()
        pending.append(video)
    score_pending()
    return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON, JSON lines or CSV by the file's ending; whole or not at all."""
    if path.suffix.lower() == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue()
    elif path.suffix.lower() == ".jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        content = json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n"
    try:
        write_text_atomically(path, content)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {error.strerror}; choose another") from error


if __name__ == "__main__":
    cli.run(main)
