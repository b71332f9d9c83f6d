"""What a language model is asked about a video, as token ids: an instruction with the video's prompt in it."""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from vpo_jax.runtime.errors import UserError

FIELD = "{text_prompt}"
FAKE_TOKEN, IMAGE_TOKEN = "<fake_token_around_image>", "<image>"  # of Idefics2
VIDEO_TOKEN = "<|video_pad|>"  # of Qwen2-VL
# One user turn of Qwen2-VL's chat (chat_template.json), before and behind the video's tokens.
_CHAT_HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
_CHAT_TAIL = "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"

# Not the text that VideoScore was trained with, which its authors publish: see `load_videoscore`.
OWN_INSTRUCTION = (
    "Watch the frames of a generated video and rate it from 1 (bad) to 4 (perfect) in five respects: visual quality, "
    "temporal consistency, dynamic degree, text-to-video alignment and factual consistency.\n"
    f'The video was made for the prompt "{FIELD}". Its frames follow:\n'
)
# Nor is this the text of VideoReward: see `load_videoreward`.
OWN_REWARD_INSTRUCTION = (
    "This video was generated. Rate it in three respects, each by itself, the higher the better.\n"
    "Visual quality, how clear, detailed and pleasing its pictures are: <|VQ_reward|>\n"
    "Motion quality, how steady, natural and smooth it moves: <|MQ_reward|>\n"
    f'Text alignment, how well it shows "{FIELD}": <|TA_reward|>\n'
)
_CACHED = 65536  # prompts


class TextEncoder:
    """Prompts in a template to token ids of one length, so that one compiled program reads them all.

    A subclass says in `_text_ids` what stands around the text.

    Attributes:
      length: tokens of a prepared text, padding included.
    """

    def __init__(self, tokenizer: Any, template: str, max_prompt_tokens: int, padding: str) -> None:
        """`padding` is "front" or "back". Raises UserError where the template has no place for the prompt."""
        if FIELD not in template:
            raise UserError(f"query_prompt: has no {FIELD} where the video's prompt goes; write it into the text")
        self._tokenizer, self._template, self._limit, self._padding = tokenizer, template, max_prompt_tokens, padding
        self._special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        self.length = len(self._text_ids("")) + max_prompt_tokens
        self._cached = functools.lru_cache(_CACHED)(self._encode)

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """{"input_ids": int32 [B, length], "mask": bool [B, length]} of the texts and their padding."""
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
                f"a prompt is longer than max_prompt_tokens={self._limit} and is cut: {prompt[:60]!r}...", stacklevel=4
            )
            ends = [end for _, end in self._tokenizer.encode(prompt, add_special_tokens=False).offsets]
            keep = min(self._limit, len(ends))
            while len(ids) > self.length:
                keep = max(0, keep - 1)
                ids = self._text_ids(prompt[: ends[keep - 1]] if keep else "")
        return tuple(ids)


class QueryEncoder(TextEncoder):
    """What a VideoScore is asked: the text, then the frames.

    The frames stand behind the text and between special tokens, so their ids are the same for every prompt: they are
    kept once, in `frame_ids`, and only the text is encoded, once a prompt, with padding in front.

    Attributes:
      frame_ids: int32 [K], ids of one frame: fake token, image tokens, fake token, and the space behind.
    """

    def __init__(
        self, tokenizer: Any, template: str, image_token_id: int, tokens_per_image: int, max_prompt_tokens: int
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


class VideoQueryEncoder(TextEncoder):
    """What a VideoReward is asked: a turn of Qwen2-VL's chat with the video first, then the text with reward tokens.

    Attributes:
      head_ids: int32 [K], ids in front of the video's tokens.
      reward_token_ids: of the tokens at which scores are read.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        video_token_id: int,
        reward_tokens: Sequence[str],
        max_prompt_tokens: int,
    ) -> None:
        """Raises UserError where the template lacks a reward token or the prompt, or for another tokenizer."""
        for token in reward_tokens:
            if template.count(token) != 1:
                raise UserError(f"query_prompt: has {token} {template.count(token)} times; write it once into the text")
        if tokenizer.token_to_id(VIDEO_TOKEN) != video_token_id:
            raise UserError(
                f"tokenizer.json: {VIDEO_TOKEN} has to be token {video_token_id}, as config.json says; use the "
                "tokenizer that belongs to this scorer"
            )
        self.reward_token_ids = tuple(int(tokenizer.token_to_id(token)) for token in reward_tokens)
        head = list(tokenizer.encode(_CHAT_HEAD).ids)
        self.head_ids = np.array(head, np.int32)
        super().__init__(tokenizer, template, max_prompt_tokens, "back")
        together = list(tokenizer.encode(_CHAT_HEAD + 2 * VIDEO_TOKEN + self._text("a")).ids)
        if together != head + 2 * [video_token_id] + self._text_ids("a"):
            raise UserError(
                "tokenizer.json: the parts of the chat are not encoded one after the other; use the tokenizer that "
                "belongs to this scorer"
            )

    def _text(self, prompt: str) -> str:
        return _CHAT_TAIL.replace("{text}", self._template.replace(FIELD, prompt))

    def _text_ids(self, prompt: str) -> list[int]:
        return list(self._tokenizer.encode(self._text(prompt)).ids)
