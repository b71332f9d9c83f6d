"""The query of a VideoScore as token ids: the text, then the frames."""

from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from vpo_jax.rewards.query import FIELD, BlankQueries, Queries, TextEncoder
from vpo_jax.runtime.errors import UserError

FAKE_TOKEN, IMAGE_TOKEN = "<fake_token_around_image>", "<image>"  # of Idefics2

# Not the text that VideoScore was trained with, which its authors publish: see `load`.
OWN_INSTRUCTION = (
    "Watch the frames of a generated video and rate it from 1 (bad) to 4 (perfect) in five respects: visual quality, "
    "temporal consistency, dynamic degree, text-to-video alignment and factual consistency.\n"
    f'The video was made for the prompt "{FIELD}". Its frames follow:\n'
)


class FrameQueries(Queries, Protocol):
    """Queries with the ids of one frame, int32 [K]."""

    @property
    def frame_ids(self) -> np.ndarray: ...


class BlankFrameQueries(BlankQueries):
    """Queries of a plan; a frame's image ids are real: without them a compiler would remove the vision encoder."""

    def __init__(self, length: int, image_token_id: int, tokens_per_image: int) -> None:
        super().__init__(length)
        self.frame_ids = np.array([0, *[image_token_id] * tokens_per_image, 0], np.int32)


class QueryEncoder(TextEncoder):
    """What a VideoScore is asked: the text, then the frames.

    The frames stand behind the text and between special tokens, so their ids are the same for every prompt: they are
    kept once, in `frame_ids`, and only the text is encoded, once a prompt, with padding in front.

    Attributes:
      frame_ids: int32 [K], ids of one frame: fake token, image tokens, fake token, and the space behind.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str, image_token_id: int, tokens_per_image: int, max_prompt_tokens: int
    ) -> None:
        """Raises UserError where the template has no place for the prompt, or the tokenizer is not Idefics2's."""
        if tokenizer.token_to_id(IMAGE_TOKEN) != image_token_id or tokenizer.token_to_id(FAKE_TOKEN) is None:
            raise UserError(
                f"tokenizer.json: {IMAGE_TOKEN} has to be token {image_token_id}, as config.json says, and "
                f"{FAKE_TOKEN} a token too; use the tokenizer that belongs to this scorer"
            )
        self._frame = f"{FAKE_TOKEN}{IMAGE_TOKEN * tokens_per_image}{FAKE_TOKEN} "
        one, two, three = (list(tokenizer.encode(template + frames * self._frame).ids) for frames in (1, 2, 3))
        frame = two[len(one) :]
        if three != one + 2 * frame or frame.count(image_token_id) != tokens_per_image:
            raise UserError(
                "tokenizer.json: frames are not encoded one after the other; use the tokenizer that belongs to this "
                "scorer"
            )
        self.frame_ids = np.array(frame, np.int32)
        super().__init__(tokenizer, template, max_prompt_tokens, "front")

    def _text_ids(self, prompt: str) -> list[int]:
        text = self._template.replace(FIELD, prompt)
        return list(self._tokenizer.encode(text + self._frame).ids)[: -len(self.frame_ids)]
