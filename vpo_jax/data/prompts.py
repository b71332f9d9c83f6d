"""Prompts from a file, a data set, or the embedded world's captions: lists of any length in little memory."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vpo_jax.data.prompt_files import PromptFile, read_prompt_file
from vpo_jax.data.sources import read_hub, read_tfds
from vpo_jax.data.views import Prompts
from vpo_jax.runtime.errors import UserError

SPLITS = ("train", "tune", "held_out")
_MOST_HELD_OUT = 10_000
_MOST_LOOKED_AT = 10_000


def load_prompts(source: str, field: str = "data.prompts") -> Sequence[str]:
    """Prompts in the order in which they stand; see `load_prompt_file`."""
    return load_prompt_file(source, field).prompts


def load_prompt_file(source: str, field: str = "data.prompts") -> PromptFile:
    """Prompts in the order in which they stand, with the names of their videos where the source gives names.

    Args:
      source: "shapes:train", "shapes:tune" or "shapes:held_out"; "tfds:FOLDER[:SPLIT]"; "hub:OWNER/NAME/FILE"; or a
        .txt, .json, .jsonl, .csv or .tsv file as `prompt_files` reads it.
      field: the config key to name in errors.

    Raises:
      UserError: nothing there, nothing in it, or something else than prompts; see `sources` and `prompt_files`.
    """
    kind, colon, rest = source.partition(":")
    read = {"shapes:": _captions, "tfds:": read_tfds, "hub:": read_hub}.get(kind + colon)
    return read(rest, field) if read is not None else read_prompt_file(source, field)


def _captions(split: str, field: str) -> PromptFile:
    from vpo_jax.shapes.world import captions

    if split not in SPLITS:
        raise UserError(f"{field}: the shapes world has no split {split!r}; choose one of {', '.join(SPLITS)}")
    return PromptFile(list(captions(split)))


class Longer(NamedTuple):
    """How many of the prompts that were looked at are longer than the text encoder reads."""

    number: int
    looked_at: int


def longer_than(prompts: Sequence[str], count: Callable[[list[str]], Sequence[int]], length: int) -> Longer:
    """Counts prompts whose words beyond `length` tokens are cut off.

    Args:
      prompts: of very many, 10,000 spread evenly over the list are looked at.
      count: texts -> tokens of each, special tokens included, before any are cut off.
      length: tokens that the text encoder reads, special tokens included.
    """
    places = np.unique(np.linspace(0, len(prompts) - 1, min(len(prompts), _MOST_LOOKED_AT)).astype(np.int64))
    number = 0
    for start in range(0, len(places), 1024):
        texts = [prompts[int(place)] for place in places[start : start + 1024]]
        number += sum(tokens > length for tokens in count(texts))
    return Longer(number, len(places))


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
