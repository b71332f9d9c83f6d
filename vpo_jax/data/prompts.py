"""Prompts from a file, a data set, or the embedded world's captions: lists of any length in little memory."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vpo_jax.data.sources import Prompts, read_file, read_hub, read_tfds
from vpo_jax.runtime.errors import UserError

SPLITS = ("train", "tune", "held_out")
_MOST_HELD_OUT = 10_000


def load_prompts(source: str, field: str = "data.prompts") -> Sequence[str]:
    """Prompts in the order in which they stand.

    Args:
      source: "shapes:train", "shapes:tune" or "shapes:held_out"; "tfds:FOLDER[:SPLIT]"; "hub:OWNER/NAME/FILE"; a
        .jsonl file of objects with a "prompt"; or a text file, one prompt a line.
      field: the config key to name in errors.

    Raises:
      UserError: nothing there, nothing in it, or something else than prompts; see `sources`.
    """
    kind, colon, rest = source.partition(":")
    read = {"shapes:": _captions, "tfds:": read_tfds, "hub:": read_hub}.get(kind + colon)
    return read(rest, field) if read is not None else read_file(Path(source), field)


def _captions(split: str, field: str) -> list[str]:
    from vpo_jax.shapes.world import captions

    if split not in SPLITS:
        raise UserError(f"{field}: the shapes world has no split {split!r}; choose one of {', '.join(SPLITS)}")
    return list(captions(split))


def set_apart(prompts: Sequence[str]) -> tuple[Sequence[str], list[str]]:
    """(training prompts, held-out prompts): every tenth different prompt, and one at least, is never trained on.

    Of very many the first 10,000 such are enough. Raises UserError where there is but one.
    """
    marks = np.fromiter((_mark(prompt) for prompt in prompts), np.int64, len(prompts))
    first = np.sort(np.unique(marks, return_index=True)[1])  # where each different prompt stands first
    if len(first) < 2:
        raise UserError("data.held_out: data.prompts has nothing to set apart for the comparison; name other prompts")
    apart = (first[9::10] if len(first) >= 10 else first[-1:])[:_MOST_HELD_OUT]
    training = np.flatnonzero(~np.isin(marks, marks[apart]))
    read: Callable[[int], str] = prompts.__getitem__
    return Prompts(read, training), [prompts[int(place)] for place in apart]


def _mark(prompt: str) -> int:
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "little", signed=True)


def fingerprint(prompts: Sequence[str]) -> str:
    """SHA-256 of a prompt list, by which a resumed run knows that its prompts are still the same."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps(prompt).encode() + b"\n")
    return digest.hexdigest()
