"""Encodings of prompts on the devices: from the text encoder, or from a cache that was filled once."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from vpo_jax.data.text_cache import TextCache, open_text_cache
from vpo_jax.runtime.mesh import BATCH, constrain
from vpo_jax.runtime.transfers import put

Tree = Any


class TextEncoding:
    """`encoding(prompts) -> encodings`, every leaf [P, ...] over data and fsdp."""

    def __init__(
        self,
        encode: Callable[[Tree, np.ndarray], Tree],
        params: Tree,
        tokenize: Callable[[Sequence[str]], np.ndarray],
        batch: int,
    ) -> None:
        """`encode(params, ids)` is jitted; a cache is filled with `batch` prompts at a time."""
        self._encode, self._params, self._tokenize, self._batch = encode, params, tokenize, batch
        self._cache: TextCache | None = None
        self._place = jax.jit(lambda text: jax.tree.map(lambda x: constrain(x, BATCH), text))

    def __call__(self, prompts: Sequence[str]) -> Tree:
        """The encodings of P prompts."""
        if self._cache is not None:
            return self._place(put(self._cache(prompts)))
        return self._encode(self._params, put(self._ids(prompts)))

    def _ids(self, prompts: Sequence[str]) -> np.ndarray:
        return self._tokenize(list(prompts))

    def cache(self, folder: str, prompts: Sequence[str]) -> None:
        """Encodes all prompts to a file in `folder`; all processes of a run have to call it.

        After it only these prompts have encodings, and the encoder is not needed any more.

        Raises:
          UserError: the disk refuses, or the processes do not share `folder`.
        """
        params = self._params

        def encode(batch: Sequence[str]) -> Tree:
            return self._encode(params, self._ids(batch))

        self._cache = open_text_cache(folder, prompts, encode, params, self._tokenize, self._batch)
        self._params = None
