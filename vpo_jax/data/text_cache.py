"""Encodings of a long list of prompts in one file on disk, made once and read row by row.

An encoding is a tree of arrays [B, ...]. A row of the file is one prompt's leaves, one after the other, as bytes.
In a run of several processes all of them encode, the main one writes, and each maps the file.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.processes import agree, fetch, is_main, main_first
from vpo_jax.runtime.trees import bytes_of, flatten
from vpo_jax.runtime.types import Tree

_PATIENCE = 30.0  # seconds until a file that the main process made has to be seen by the others, as over NFS


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
    params: Tree,
    tokenize: Callable[[Sequence[str]], np.ndarray],
    batch: int,
) -> TextCache:
    """The cache of `prompts` in `folder`, encoded now where no file of just these prompts and this encoder is there.

    All processes of a run have to call it. The file does not depend on their number, and `folder` has to be one that
    they share.

    Args:
      folder: made where it is absent. The file in it is named by a digest of the tokens and of `params`.
      prompts: any number; one that stands twice is kept once.
      encode: prompts -> tree of [B, ...], always called with `batch` of them, in the order of `prompts`.
      params: the text encoder's, for the digest.
      tokenize: prompts -> ids int32 [B, L], for the digest.
      batch: prompts at a time.

    Raises:
      UserError: the disk refuses, or some process does not see what the main one writes.
    """
    unique = list(dict.fromkeys(prompts))
    form = jax.eval_shape(lambda: encode(unique[:1] * batch))
    words = "; ".join(f"{path} {leaf.shape[1:]} {leaf.dtype}" for path, leaf in flatten(form).items())
    file = Path(folder, f"text-{_digest(unique, params, tokenize, words)}.bin")
    width = bytes_of(form) // batch
    size = len(unique) * width
    # The main process decides. The others do not look before it has written: NFS remembers for a while what was absent.
    if not agree(is_main() and _size(file) == size):
        _fill(file, unique, encode, batch)
    _check_seen(file, size)
    encodings = np.memmap(file, np.uint8, "r", shape=(len(unique), width))
    return TextCache({prompt: i for i, prompt in enumerate(unique)}, encodings, form)


def _fill(file: Path, prompts: Sequence[str], encode: Callable[[Sequence[str]], Tree], batch: int) -> None:
    unfinished = file.with_name(f".{file.name}.partial")
    try:
        main_first(partial(_begin, unfinished))
        _check_seen(unfinished, 0)  # before the work
        for start in range(0, len(prompts), batch):
            part = list(prompts[start : start + batch])
            # Filled up, so that one program serves all and a row does not depend on where the list ends.
            encoded = fetch(encode(part + part[-1:] * (batch - len(part))))
            leaves = [np.ascontiguousarray(leaf).reshape(batch, -1) for leaf in jax.tree.leaves(encoded)]
            rows = np.concatenate([leaf.view(np.uint8) for leaf in leaves], axis=1)[: len(part)]
            main_first(partial(_append, unfinished, rows))
        main_first(partial(_finish, unfinished, file))
    finally:
        if is_main():
            with contextlib.suppress(OSError):
                unfinished.unlink()


def _begin(file: Path) -> None:
    with _writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")


def _append(file: Path, rows: np.ndarray) -> None:
    with _writing(file), file.open("ab") as stream:
        stream.write(rows.tobytes())


def _finish(unfinished: Path, file: Path) -> None:
    with _writing(file):
        unfinished.rename(file)


@contextlib.contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"data.text_cache: {file} cannot be written ({error}); free space or another folder") from error


def _check_seen(file: Path, size: int) -> None:
    """Raises UserError in all processes unless each of them sees a file of that size."""
    deadline = time.monotonic() + _PATIENCE
    while not (seen := _size(file) == size) and not is_main() and time.monotonic() < deadline:
        time.sleep(0.05)
    if agree(not seen):
        raise UserError(
            f"data.text_cache: {file.parent} is not the same folder in all processes; give one on a disk that all of"
            " them share, or leave it empty"
        )


def _size(file: Path) -> int:
    """Bytes of a file, -1 where there is none."""
    try:
        return file.stat().st_size
    except OSError:
        return -1


def _digest(prompts: Sequence[str], params: Tree, tokenize: Callable[[Sequence[str]], np.ndarray], form: str) -> str:
    """Of what the encodings depend on: the prompts' order and tokens, every weight, their shape and dtype."""
    digest = hashlib.blake2b(form.encode(), digest_size=16)
    for start in range(0, len(prompts), 1024):
        digest.update(tokenize(prompts[start : start + 1024]).tobytes())
    leaves = flatten(params)
    sums = jax.device_get(_checksums(tuple(leaves.values())))
    for (path, leaf), row in sorted(zip(leaves.items(), sums, strict=True), key=lambda item: item[0][0]):
        digest.update(f"{path} {leaf.shape} {leaf.dtype} {row.tolist()};".encode())
    return digest.hexdigest()


@jax.jit
def _checksums(leaves: tuple[jax.Array, ...]) -> jax.Array:
    """Two sums uint32 [leaves, 2] of each array's bits, mixed with their places.

    Whole numbers modulo 2^32: the same on any devices, however the arrays are sharded, and no array leaves them.
    """
    sums = [_checksum(leaf, seed) for leaf in leaves for seed in (0x9E3779B9, 0x7F4A7C15)]
    return jnp.array(sums, jnp.uint32).reshape(-1, 2)


def _checksum(x: jax.Array, seed: int) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.bool_):
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    mixed = x.astype(jnp.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed += place * jnp.uint32(seed * stride % 2**32)
        stride *= x.shape[axis]
    # MurmurHash3's finaliser: every bit of the sum above changes every bit of the result.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return mixed.sum(dtype=jnp.uint32)
