"""Encodings of a long list of prompts in one file on disk, made once and read row by row."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import flatten


class TextCache:
    """Encodings [P, L, D] of P prompts, mapped from disk."""

    def __init__(self, rows: dict[str, int], encodings: np.ndarray) -> None:
        self._rows = rows
        self._encodings = encodings

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._rows

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """[B, L, D] of B prompts, in memory; KeyError for one that is not here."""
        return np.stack([self._encodings[self._rows[prompt]] for prompt in prompts])


def open_text_cache(
    folder: str | Path,
    prompts: Sequence[str],
    encode: Callable[[Sequence[str]], jax.Array],
    params: Any,
    tokenize: Callable[[Sequence[str]], np.ndarray],
    batch: int,
) -> TextCache:
    """The cache of `prompts` in `folder`, encoded now where no file of just these prompts and this encoder is there.

    Args:
      folder: made where it is absent. The file in it is named by a digest of the tokens and of `params`.
      prompts: any number; one that stands twice is kept once.
      encode: prompts -> [B, L, D], always called with `batch` of them.
      params: the text encoder's, for the digest.
      tokenize: prompts -> ids int32 [B, L], for the digest.
      batch: prompts at a time.

    Raises:
      UserError: the disk refuses.
    """
    unique = list(dict.fromkeys(prompts))
    shape = jax.eval_shape(lambda: encode(unique[:1] * batch))
    digest = _digest(unique, params, tokenize, f"{shape.shape[1:]} {shape.dtype}")
    file = Path(folder, f"text-{digest}.bin")
    whole = (len(unique), *shape.shape[1:])
    if not (file.is_file() and file.stat().st_size == math.prod(whole) * shape.dtype.itemsize):
        _fill(file, unique, encode, batch)
    encodings = np.memmap(file, shape.dtype, "r", shape=whole)
    return TextCache({prompt: i for i, prompt in enumerate(unique)}, encodings)


def _fill(file: Path, prompts: Sequence[str], encode: Callable[[Sequence[str]], jax.Array], batch: int) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            for start in range(0, len(prompts), batch):
                part = list(prompts[start : start + batch])
                # Filled up, so that one program serves all and a row does not depend on where the list ends.
                rows = np.asarray(encode(part + part[-1:] * (batch - len(part))))
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
