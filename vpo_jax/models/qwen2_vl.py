"""Qwen2-VL with a reward head, as VideoReward has it (arXiv 2501.13918), in Flax linen.

A vision encoder makes tokens of pairs of frames, a Qwen2 decoder reads them between the words, and a linear head
reads the decoder at three special words of the question.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.models.layers import Dense
from vpo_jax.models.mistral import MistralModel, fill_in, rotary_angles
from vpo_jax.models.qwen2_vl_config import Qwen2VLConfig, TextConfig
from vpo_jax.models.qwen2_vl_vision import VisionModel
from vpo_jax.runtime.types import DType


def count_positions(token_mask: jax.Array) -> jax.Array:
    """Places that count real tokens, the same for time, row and column: bool [B, L] -> int32 [3, B, L]."""
    places = jnp.where(token_mask, jnp.cumsum(token_mask, axis=1) - 1, 0)
    return jnp.broadcast_to(places, (3, *places.shape)).astype(jnp.int32)


def grid_positions(token_mask: jax.Array, is_video: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
    """Time, row and column of each token (M-RoPE, arXiv 2409.12191): bool [B, L] twice -> int32 [3, B, L].

    A video's tokens lie on a grid from the place behind the text before it; the text behind it goes on where the
    longer of the grid's sides ends. Transformers' `get_rope_index` since 5.0 takes no account of the grid's times
    there, and that is what is done here. Padding is at 0.

    Args:
        token_mask: real tokens.
        is_video: tokens of videos; each row may have several videos of one grid, with text between them.
        grid: times, rows and columns of a video's tokens.
    """
    times, rows, columns = grid
    is_video = is_video & token_mask
    seen = jnp.cumsum(is_video, axis=1)
    words = jnp.cumsum(token_mask & ~is_video, axis=1)
    which, inside = jnp.divmod(jnp.where(is_video, seen - 1, seen), times * rows * columns)
    start = words + which * max(rows, columns)
    place = jnp.stack([inside // (rows * columns), inside // columns % rows, inside % columns])
    return jnp.where(token_mask, jnp.where(is_video, start + place, start - 1), 0).astype(jnp.int32)


def position_angles(positions: jax.Array, config: TextConfig) -> jax.Array:
    """Rotation of each pair of channels: int32 [3, B, L] -> float32 [B, L, head_size / 2].

    The first mrope_section[0] pairs turn with the time, the next with the row, then the column, and so on around.
    """
    section, ends = config.mrope_section, np.cumsum(config.mrope_section)
    angles = [rotary_angles(place, config.head_size, config.rope_theta) for place in positions]
    parts = [angles[i % 3][..., ends[i] - size : ends[i]] for i, size in enumerate(section)]
    return jnp.concatenate(parts, axis=-1)


class Qwen2VLModel(nn.Module):
    """A video and tokens to hidden states."""

    config: Qwen2VLConfig
    dtype: DType = jnp.float32
    backend: str = "xla"

    def setup(self) -> None:
        """Submodules, named as in the checkpoint."""
        self.visual = VisionModel(self.config.vision, self.dtype, self.backend)
        self.language_model = MistralModel(self.config.text, self.dtype, self.backend)

    def see(self, pixels: jax.Array) -> jax.Array:
        """Tokens of videos: see `VisionModel`."""
        return self.visual(pixels)

    def read(self, ids: jax.Array, token_mask: jax.Array, positions: jax.Array, video: jax.Array) -> jax.Array:
        """Last hidden state [B, L, C] of ids [B, L]; the tokens of video [B, T, C] take the video tokens' places."""
        is_video = (ids == self.config.video_token_id) & token_mask
        embeddings = fill_in(self.language_model.embed(ids), is_video, video)
        angles = position_angles(positions, self.config.text)
        hidden: jax.Array = self.language_model(embeddings, token_mask, angles=angles)[0]
        return hidden


class Qwen2VLRewardModel(nn.Module):
    """Scores of videos, one at each of three special tokens.

    Attributes:
        config: of the model.
        reward_token_ids: of the special tokens; each stands once in every row.
        outputs: of the head: 1, or 3 of which the i-th token's i-th counts.
        dtype: of the computation; the head computes in float32.
        backend: of attention.
    """

    config: Qwen2VLConfig
    reward_token_ids: tuple[int, ...]
    outputs: int = 1
    dtype: DType = jnp.float32
    backend: str = "xla"

    def setup(self) -> None:
        """Submodules, named as in the checkpoint."""
        self.model = Qwen2VLModel(self.config, self.dtype, self.backend)
        self.rm_head = Dense(self.outputs, use_bias=False)

    def see(self, pixels: jax.Array) -> jax.Array:
        """Tokens of videos, as many as fit into memory: see `VisionModel`."""
        return self.model.see(pixels)

    def judge(self, ids: jax.Array, token_mask: jax.Array, positions: jax.Array, video: jax.Array) -> jax.Array:
        """Scores, float32 [B, 3], unbounded.

        Args:
            ids: int32 [B, L], with T video tokens in each row.
            token_mask: bool [B, L]; False is padding, before or behind the row's tokens.
            positions: int32 [3, B, L], of `count_positions` or `grid_positions`.
            video: [B, T, C], from `see`.
        """
        hidden = self.model.read(ids, token_mask, positions, video)
        wanted = jnp.asarray(self.reward_token_ids)[None, :, None]
        places = jnp.argmax((ids[:, None, :] == wanted) & token_mask[:, None, :], axis=-1)  # [B, 3]
        scores = self.rm_head(jnp.take_along_axis(hidden, places[..., None], axis=1))  # [B, 3, outputs]
        return scores[..., 0] if self.outputs == 1 else jnp.diagonal(scores, axis1=1, axis2=2)

    def __call__(self, ids: jax.Array, token_mask: jax.Array, positions: jax.Array, pixels: jax.Array) -> jax.Array:
        """Scores, float32 [B, 3], of ids [B, L] and pixels [B, f, H, W, 3]: see `judge`."""
        return self.judge(ids, token_mask, positions, self.see(pixels))
