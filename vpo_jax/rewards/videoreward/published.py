"""VideoReward at its published size, for plans without the weights."""

from typing import Any

import jax
import jax.numpy as jnp

from vpo_jax.models.qwen2_vl import Qwen2VLRewardModel
from vpo_jax.models.qwen2_vl_config import Qwen2VLConfig
from vpo_jax.rewards.videoreward.folder import REWARD_TOKENS, RewardSettings, videoreward_shapes
from vpo_jax.rewards.videoreward.frames import SmartFrameSettings
from vpo_jax.rewards.videoreward.query import BlankHeadQueries
from vpo_jax.rewards.videoreward.reward import Options, VideoRewardReward
from vpo_jax.runtime.trees import cast_floating

# KwaiVGI/VideoReward: Qwen/Qwen2-VL-2B-Instruct's values with a head of one output, read at three tokens.
CONFIG: dict[str, Any] = {
    "video_token_id": 151656,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "hidden_size": 1536,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151660,  # of its tokenizer with the three tokens: 151657 + 3
}
SETTINGS = RewardSettings(max_frame_pixels=448 * 448, fps=2.0)  # of its model_config.json
QUERY_TOKENS = 868  # of the authors' question, about 740, and of a padded prompt, 128
_HEAD_TOKENS = 16  # in front of the video


def abstract(name: str, options: Options) -> VideoRewardReward:
    """The published scorer in bfloat16 with shapes for `params`; what it is asked is a number of tokens."""
    config = Qwen2VLConfig.from_dict(CONFIG)
    tokens = tuple(range(config.text.vocab_size - len(REWARD_TOKENS), config.text.vocab_size))
    model = Qwen2VLRewardModel(config, tokens, SETTINGS.outputs, jnp.bfloat16)
    queries = BlankHeadQueries(QUERY_TOKENS, _HEAD_TOKENS)
    frames = SmartFrameSettings(config.vision.factor, options.min_pixels, SETTINGS.max_frame_pixels)
    shapes = videoreward_shapes(config, SETTINGS.outputs)
    params = jax.eval_shape(lambda tree: cast_floating(tree, jnp.bfloat16), shapes)
    return VideoRewardReward(name, model, params, queries, frames, SETTINGS, options)
