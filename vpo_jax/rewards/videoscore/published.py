"""VideoScore at its published size, for plans without the weights."""

from typing import Any

import jax
import jax.numpy as jnp

from vpo_jax.models.idefics2 import Idefics2ForSequenceClassification
from vpo_jax.models.idefics2_config import Idefics2Config
from vpo_jax.rewards.protocol import DIMENSIONS
from vpo_jax.rewards.videoscore.folder import videoscore_shapes
from vpo_jax.rewards.videoscore.frames import FrameSettings
from vpo_jax.rewards.videoscore.query import BlankFrameQueries
from vpo_jax.rewards.videoscore.reward import Options, VideoScoreReward
from vpo_jax.runtime.trees import cast_floating

# TIGER-Lab/VideoScore: HuggingFaceM4/idefics2-8b's values with a vocabulary of 32003.
CONFIG: dict[str, Any] = {
    "image_token_id": 32001,
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 980,
        "patch_size": 14,
    },
    "perceiver_config": {"resampler_n_latents": 64, "resampler_depth": 3, "resampler_n_heads": 16},
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 32003,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
    },
}
QUERY_TOKENS = 376  # of the authors' instruction, about 250, and of a padded prompt, 128


def abstract(name: str, options: Options) -> VideoScoreReward:
    """The published scorer in bfloat16 with shapes for `params`; what it is asked is a number of tokens."""
    config = Idefics2Config.from_dict(CONFIG)
    shapes = videoscore_shapes(config, len(DIMENSIONS))
    params = jax.eval_shape(lambda tree: cast_floating(tree, jnp.bfloat16), shapes)
    model = Idefics2ForSequenceClassification(config, len(DIMENSIONS), jnp.bfloat16)
    queries = BlankFrameQueries(QUERY_TOKENS, config.image_token_id, config.perceiver.resampler_n_latents)
    return VideoScoreReward(name, model, params, queries, FrameSettings(), options)
