"""Scores of video files.

python -m vpo_jax.score --scorer=NAME_OR_DIR --videos=GLOB [--prompts=FILE] --output=FILE
"""

import csv
import glob
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vpo_jax.data.prompts import load_prompts
from vpo_jax.rewards.loading import load_scorer
from vpo_jax.rewards.scoring import Scorer
from vpo_jax.runtime import cli
from vpo_jax.runtime.backend import keep_compiled_programs, keep_freed_memory
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.files import write_text_atomically
from vpo_jax.runtime.video import read_video

FORMATS = (".json", ".jsonl", ".csv")
BATCH = 32  # videos in memory at a time


def main(argv: Sequence[str]) -> None:
    """Scores what the flags name."""
    parser = cli.Parser("vpo_jax.score", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--scorer", required=True, help="shapes, classical, judge, a folder, or MODULE:FUNCTION")
    parser.add_argument("--videos", required=True, help="pattern of files, quoted; ** goes into folders")
    parser.add_argument("--prompts", default="", help="a prompt for each video, in the order of their sorted names")
    parser.add_argument("--output", required=True, help="a .json, .jsonl or .csv file")
    parser.add_argument(
        "--every_pixel", type=int, default=1, help="keep one pixel of K x K: undoes how small videos are enlarged"
    )
    flags = parser.parse(argv)
    output = _checked_output(flags.output)
    if flags.every_pixel < 1:
        raise UserError(f"--every_pixel: {flags.every_pixel} must be 1 or more")
    paths = find_videos(flags.videos)
    prompts = load_prompts(flags.prompts, "--prompts") if flags.prompts else [""] * len(paths)
    if len(prompts) != len(paths):
        raise UserError(f"--prompts: {len(prompts)} prompts for {len(paths)} videos; give one to each, in their order")
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
    """Files that the pattern names, sorted."""
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not paths:
        raise UserError(f"--videos: no file is named {pattern!r}; quote the pattern and mind where you are")
    return paths


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
    if path.suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue()
    elif path.suffix == ".jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        content = json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n"
    try:
        write_text_atomically(path, content)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {error.strerror}; choose another") from error


def _checked_output(name: str) -> Path:
    path = Path(name)
    if path.suffix not in FORMATS:
        raise UserError(f"--output: {name} must end in one of {', '.join(FORMATS)}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--output: {name} cannot be written; give a file in a folder that you may write into")
    return path


if __name__ == "__main__":
    cli.run(main)
