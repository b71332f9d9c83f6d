"""Published checkpoints: configs, for plans without the weights, and licences.

Source: the config.json files that diffusers' scripts/convert_wan_to_diffusers.py writes.
"""

from typing import Any

from vpo_jax.families.wan.published_vae import VAE_2_1, VAE_2_2

_TRANSFORMER: dict[str, Any] = {
    "patch_size": [1, 2, 2],
    "attention_head_dim": 128,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
}


def _transformer(heads: int, layers: int, ffn_dim: int, channels: int) -> dict[str, Any]:
    sizes = {"num_attention_heads": heads, "num_layers": layers, "ffn_dim": ffn_dim}
    return {**_TRANSFORMER, **sizes, "in_channels": channels, "out_channels": channels}


UMT5_XXL: dict[str, Any] = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
# Of every text-to-video folder; TI2V-5B has a shift of 5.
SCHEDULER: dict[str, Any] = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
}


def _published(transformer: dict[str, Any], vae: dict[str, Any], shift: float = 3.0, **more: Any) -> dict[str, Any]:
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": UMT5_XXL,
        "scheduler": {**SCHEDULER, "flow_shift": shift},
        "model_index": {"boundary_ratio": None, "expand_timesteps": False},
        **more,
    }


_LARGE = _transformer(40, 40, 13824, 16)
PUBLISHED: dict[str, dict[str, Any]] = {
    "wan2.1-1.3b": _published(_transformer(12, 30, 8960, 16), VAE_2_1),
    "wan2.1-14b": _published(_LARGE, VAE_2_1),
    "wan2.2-a14b": _published(
        _LARGE, VAE_2_1, transformer_2=_LARGE, model_index={"boundary_ratio": 0.875, "expand_timesteps": False}
    ),
    "wan2.2-5b": _published(
        _transformer(24, 30, 14336, 48), VAE_2_2, 5.0, model_index={"boundary_ratio": None, "expand_timesteps": True}
    ),
}

# Of the weights, by a part of a checkpoint's name.
LICENCES = {"wan2.1": "apache-2.0", "wan2.2": "apache-2.0", "wan-2.1": "apache-2.0", "wan-2.2": "apache-2.0"}
