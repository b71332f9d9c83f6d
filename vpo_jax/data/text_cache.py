"""Encodings of a long list of prompts in one file on disk, made once and read row by row.

An encoding is a tree of arrays [B, ...]. A row of the file is one prompt's leaves, one after the other, as bytes.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import bytes_of, flatten

Tree = Any


class TextCache:
    """Encodings of P prompts, mapped from disk: bytes [P, S] of trees with the shapes of `form` [B, ...]."""

    def __init__(self, rows: dict[str, int], encodings: np.ndarray, form: Tree) -> None:
        self._rows = rows
        self._encodings = encodings
        self._form = form

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._rows

    def __call__(self, prompts: Sequence[str]) -> Tree:
        """The encoding [B, ...] of B prompts, in memory; KeyError for one that is not here."""
        rows = np.stack([self._encodings[self._rows[prompt]] for prompt in prompts])
        leaves, structure = jax.tree.flatten(self._form)
        ends = np.cumsum([bytes_of(leaf) // leaf.shape[0] for leaf in leaves])
        parts = np.split(rows, ends[:-1], axis=1)
        found = [
            np.ascontiguousarray(part).view(leaf.dtype).reshape(-1, *leaf.shape[1:])
            for part, leaf in zip(parts, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, found)


def open_text_cache(
    folder: str | Path,
    prompts: Sequence[str],
    encode: Callable[[Sequence[str]], Tree],
    params: Any,
    tokenize: Callable[[Sequence[str]], np.ndarray],
    batch: int,
) -> TextCache:
    """The cache of `prompts` in `folder`, encoded now where no file of just these prompts and this encoder is there.

    Args:
      folder: made where it is absent. The file in it is named by a digest of the tokens and of `params`.
      prompts: any number; one that stands twice is kept once.
      encode: prompts -> tree of [B, ...], always called with `batch` of them.
      params: the text encoder's, for the digest.
      tokenize: prompts -> ids int32 [B, L], for the digest.
      batch: prompts at a time.

    Raises:
      UserError: the disk refuses.
    """
    unique = list(dict.fromkeys(prompts))
    form = jax.eval_shape(lambda: encode(unique[:1] * batch))
    words = "; ".join(f"{path} {leaf.shape[1:]} {leaf.dtype}" for path, leaf in flatten(form).items())
    file = Path(folder, f"text-{_digest(unique, params, tokenize, words)}.bin")
    whole = (len(unique), bytes_of(form) // batch)
    if not (file.is_file() and file.stat().st_size == math.prod(whole)):
        _fill(file, unique, encode, batch)
    encodings = np.memmap(file, np.uint8, "r", shape=whole)
    return TextCache({prompt: i for i, prompt in enumerate(unique)}, encodings, form)


def _fill(file: Path, prompts: Sequence[str], encode: Callable[[Sequence[str]], Tree], batch: int) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            for start in range(0, len(prompts), batch):
                part = list(prompts[start : start + batch])
                # Filled up, so that one program serves all and a row does not depend on where the list ends.
                encoded = jax.device_get(encode(part + part[-1:] * (batch - len(part))))
                leaves = [np.ascontiguousarray(leaf).reshape(batch, -1) for leaf in jax.tree.leaves(encoded)]
                rows = np.concatenate([leaf.view(np.uint8) for leaf in leaves], axis=1)
                stream.write(rows[: len(part)].tobytes())
        partial.rename(file)
    except OSError as error:
        raise UserError(f"data.text_cache: {file} cannot be written ({error}); free space or another folder") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _digest(prompts: Sequence[str], params: Any, tokenize: Callable[[Sequence[str]], np.ndarray], form: str) -> str:
    """Of what the encodings depend on: the prompts' order and tokens, every weight, their shape and dtype."""
    digest = hashlib.blake2b(form.encode(), digest_size=16)
    for start in range(0, len(prompts), 1024):
        digest.update(tokenize(prompts[start : start + 1024]).tobytes())
    for path, leaf in sorted(flatten(params).items()):
        digest.update(path.encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
