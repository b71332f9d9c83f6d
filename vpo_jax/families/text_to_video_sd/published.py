"""Published checkpoints: configs, for plans without the weights, and licences."""

from typing import Any

# damo-vilab/text-to-video-ms-1.7b.
MODELSCOPE: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 1024,
        "attention_head_dim": 64,
        "norm_num_groups": 32,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "max_position_embeddings": 77,
        "vocab_size": 49408,
    },
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "epsilon",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
}
PUBLISHED = {"modelscope": MODELSCOPE}

# Licences of the weights by a part of a checkpoint's name. None of them is a permission that this project gives.
LICENCES = {
    "text-to-video-ms-1.7b": "cc-by-nc-4.0",
    "modelscope": "cc-by-nc-4.0",
    "zeroscope": "cc-by-nc-4.0",
    "videocrafter2": "apache-2.0",
    "videocrafter-2": "apache-2.0",
    "videocrafter_2": "apache-2.0",
}
