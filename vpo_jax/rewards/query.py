"""What a VideoScore is asked, as token ids: an instruction with the video's prompt in it, then the frames."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from vpo_jax.runtime.errors import UserError

FIELD = "{text_prompt}"
FAKE_TOKEN, IMAGE_TOKEN = "<fake_token_around_image>", "<image>"

# Not the text that VideoScore was trained with, which its authors publish: see `load_videoscore`.
OWN_INSTRUCTION = (
    "Watch the frames of a generated video and rate it from 1 (bad) to 4 (perfect) in five respects: visual quality, "
    "temporal consistency, dynamic degree, text-to-video alignment and factual consistency.\n"
    f'The video was made for the prompt "{FIELD}". Its frames follow:\n'
)
_CACHED = 65536  # prompts


class QueryEncoder:
    """Prompts to token ids of one length, so that one compiled program reads them all.

    The frames stand behind the text and between special tokens, so their ids are the same for every prompt: they are
    kept once, in `frame_ids`, and only the text is encoded, once a prompt.

    Attributes:
      frame_ids: int32 [K], ids of one frame: fake token, image tokens, fake token, and the space behind.
      length: tokens of a prepared text, padding included.
    """

    def __init__(
        self, tokenizer: Any, template: str, image_token_id: int, tokens_per_image: int, max_prompt_tokens: int
    ) -> None:
        """Raises UserError where the template has no place for the prompt, or the tokenizer is not Idefics2's."""
        if FIELD not in template:
            raise UserError(f"query_prompt: has no {FIELD} where the video's prompt goes; write it into the text")
        if tokenizer.token_to_id(IMAGE_TOKEN) != image_token_id or tokenizer.token_to_id(FAKE_TOKEN) is None:
            raise UserError(
                f"tokenizer.json: {IMAGE_TOKEN} has to be token {image_token_id}, as config.json says, and "
                f"{FAKE_TOKEN} a token too; use the tokenizer that belongs to this scorer"
            )
        self._tokenizer, self._template, self._limit = tokenizer, template, max_prompt_tokens
        self._frame = f"{FAKE_TOKEN}{IMAGE_TOKEN * tokens_per_image}{FAKE_TOKEN} "
        self._special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]

        one, two, three = (self._ids(template + frames * self._frame) for frames in (1, 2, 3))
        frame = two[len(one) :]
        if three != one + 2 * frame or frame.count(image_token_id) != tokens_per_image:
            raise UserError(
                "tokenizer.json: frames are not encoded one after the other; use the tokenizer that belongs to this "
                "scorer"
            )
        self.frame_ids = np.array(frame, np.int32)
        self.length = len(self._text_ids("")) + max_prompt_tokens
        self._cached = functools.lru_cache(_CACHED)(self._encode)

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """{"input_ids": int32 [B, length], "mask": bool [B, length]} of the texts, padding in front."""
        ids, mask = np.zeros((len(prompts), self.length), np.int32), np.zeros((len(prompts), self.length), bool)
        for row, prompt in enumerate(prompts):
            encoded = self._cached(prompt)
            place = slice(self.length - len(encoded), None)
            ids[row, place], mask[row, place] = encoded, True
        return {"input_ids": ids, "mask": mask}

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def _text_ids(self, prompt: str) -> list[int]:
        text = self._template.replace(FIELD, prompt)
        return self._ids(text + self._frame)[: -len(self.frame_ids)]

    def _encode(self, prompt: str) -> tuple[int, ...]:
        for token in self._special:
            prompt = prompt.replace(token, " ")  # words that only look like the tokenizer's special ones
        ids = self._text_ids(prompt)
        if len(ids) > self.length:
            warnings.warn(
                f"a prompt is longer than max_prompt_tokens={self._limit} and is cut: {prompt[:60]!r}...", stacklevel=4
            )
            ends = [end for _, end in self._tokenizer.encode(prompt, add_special_tokens=False).offsets]
            keep = min(self._limit, len(ends))
            while len(ids) > self.length:
                keep = max(0, keep - 1)
                ids = self._text_ids(prompt[: ends[keep - 1]] if keep else "")
        return tuple(ids)
