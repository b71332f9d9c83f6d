"""The query of a VideoReward as token ids: the video, then a text that contains reward tokens."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from vpo_jax.rewards.query import FIELD, BlankQueries, Queries, TextEncoder
from vpo_jax.runtime.errors import UserError

VIDEO_TOKEN = "<|video_pad|>"  # of Qwen2-VL
# One user turn of Qwen2-VL's chat (chat_template.json), before and behind the video's tokens.
_CHAT_HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
_CHAT_TAIL = "<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"

# Not the text that VideoReward was trained with, which its authors publish: see `load`.
OWN_INSTRUCTION = (
    "This video was generated. Rate it in three respects, each by itself, the higher the better.\n"
    "Visual quality, how clear, detailed and pleasing its pictures are: <|VQ_reward|>\n"
    "Motion quality, how steady, natural and smooth it moves: <|MQ_reward|>\n"
    f'Text alignment, how well it shows "{FIELD}": <|TA_reward|>\n'
)


class HeadQueries(Queries, Protocol):
    """Queries with the ids in front of the video's tokens, int32 [K]."""

    @property
    def head_ids(self) -> np.ndarray: ...


class BlankHeadQueries(BlankQueries):
    """Queries of a plan."""

    def __init__(self, length: int, tokens_of_head: int) -> None:
        super().__init__(length)
        self.head_ids = np.zeros(tokens_of_head, np.int32)


class VideoQueryEncoder(TextEncoder):
    """What a VideoReward is asked: a turn of Qwen2-VL's chat with the video first, then the text with reward tokens.

    Attributes:
      head_ids: int32 [K], ids in front of the video's tokens.
      reward_token_ids: of the tokens at which scores are read.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
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
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in reward_tokens if token not in vocabulary]:
            raise UserError(
                f"tokenizer.json: has no {', '.join(missing)}; use the tokenizer that belongs to this scorer"
            )
        self.reward_token_ids = tuple(vocabulary[token] for token in reward_tokens)
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
