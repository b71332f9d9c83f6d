"""Published scorers by their configs alone, for plans without the weights."""

from typing import Any

# TIGER-Lab/VideoScore: HuggingFaceM4/idefics2-8b's values with a vocabulary of 32003.
VIDEOSCORE: dict[str, Any] = {
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
# KwaiVGI/VideoReward: Qwen/Qwen2-VL-2B-Instruct's values with a head of one output, read at three tokens.
VIDEOREWARD: dict[str, Any] = {
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
VIDEOREWARD_SETTINGS: dict[str, Any] = {"max_frame_pixels": 448 * 448, "fps": 2.0}  # of its model_config.json
SCORERS = {"videoscore": VIDEOSCORE, "videoreward": VIDEOREWARD}
# Tokens of an instruction (VideoScore's has about 250, VideoReward's about 740) and of a padded prompt (128).
QUERY_TOKENS = {"videoscore": 376, "videoreward": 868}
