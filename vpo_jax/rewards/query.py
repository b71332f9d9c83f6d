"""The query of a scorer that is a language model, as token ids: an instruction with the video's prompt in it."""

import functools
import warnings
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from vpo_jax.runtime.errors import UserError

FIELD = "{text_prompt}"
QUERY_FILE = "query_prompt.txt"  # of a scorer's folder
_CACHED = 65536  # prompts


class Queries(Protocol):
    """What encodes prompts; `length` is the number of tokens of a prepared text, padding included."""

    @property
    def length(self) -> int: ...

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """{"input_ids": int32 [P, length], "mask": bool [P, length]} of the texts and their padding."""
        ...


class BlankQueries:
    """Replaces a `TextEncoder` in a plan: it has the number of tokens only.

    Attributes:
      length: tokens of a prepared text.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """As `TextEncoder`, every token 0 and real."""
        shape = (len(prompts), self.length)
        return {"input_ids": np.zeros(shape, np.int32), "mask": np.ones(shape, bool)}


class TextEncoder:
    """Prompts in a template to token ids of one length, so that one compiled program reads them all.

    A subclass defines in `_text_ids` which tokens surround the text.

    Attributes:
      length: tokens of a prepared text, padding included.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, max_prompt_tokens: int, padding: str) -> None:
        """`padding` is "front" or "back". Raises UserError where the template has no place for the prompt."""
        if FIELD not in template:
            raise UserError(f"query_prompt: has no {FIELD} where the video's prompt goes; write it into the text")
        self._tokenizer, self._template, self._limit, self._padding = tokenizer, template, max_prompt_tokens, padding
        self._special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        self.length = len(self._text_ids("")) + max_prompt_tokens
        self._cached = functools.lru_cache(_CACHED)(self._encode)

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """{"input_ids": int32 [P, length], "mask": bool [P, length]} of the texts and their padding."""
        ids, mask = np.zeros((len(prompts), self.length), np.int32), np.zeros((len(prompts), self.length), bool)
        for row, prompt in enumerate(prompts):
            encoded = self._cached(prompt)
            place = slice(self.length - len(encoded), None) if self._padding == "front" else slice(0, len(encoded))
            ids[row, place], mask[row, place] = encoded, True
        return {"input_ids": ids, "mask": mask}

    def _text_ids(self, prompt: str) -> list[int]:
        raise NotImplementedError

    def _encode(self, prompt: str) -> tuple[int, ...]:
        for token in self._special:
            prompt = prompt.replace(token, " ")  # words that only look like the tokenizer's special ones
        ids = self._text_ids(prompt)
        if len(ids) > self.length:
            warnings.warn(
                f"a prompt is longer than max_prompt_tokens={self._limit} and is truncated: {prompt[:60]!r}...",
                stacklevel=4,
            )
            ends = [end for _, end in self._tokenizer.encode(prompt, add_special_tokens=False).offsets]
            keep = min(self._limit, len(ends))
            while len(ids) > self.length:
                keep = max(0, keep - 1)
                ids = self._text_ids(prompt[: ends[keep - 1]] if keep else "")
        return tuple(ids)
