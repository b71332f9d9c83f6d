"""The diffusers folder of a WanPipeline: one or two transformers, a causal video autoencoder and umT5's encoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vpo_jax.checkpoints import folders
from vpo_jax.checkpoints.folders import Component, Configs, Layout
from vpo_jax.checkpoints.safetensors_io import DIFFUSERS_STEM, TRANSFORMERS_STEM
from vpo_jax.families.wan.prompts import WanTokenizer
from vpo_jax.models.autoencoder_kl_wan import AutoencoderKLWan
from vpo_jax.models.umt5 import UMT5Config, UMT5EncoderModel, one_embedding
from vpo_jax.models.wan_transformer import WanTransformer3DModel
from vpo_jax.models.wan_transformer_config import WanTransformerConfig
from vpo_jax.models.wan_vae_config import AutoencoderKLWanConfig


def _transformer_inputs(config: WanTransformerConfig) -> tuple[jax.ShapeDtypeStruct, ...]:
    latents = jax.ShapeDtypeStruct((1, *config.patch_size, config.in_channels), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 1, config.text_dim), jnp.float32)
    return latents, jax.ShapeDtypeStruct((1,), jnp.float32), text


def _vae_inputs(config: AutoencoderKLWanConfig) -> tuple[jax.ShapeDtypeStruct, ...]:
    frames, side = 1 + config.scale_factor_temporal, config.scale_factor_spatial
    return (jax.ShapeDtypeStruct((1, frames, side, side, 3), jnp.float32),)


def _text_inputs(config: UMT5Config) -> tuple[jax.ShapeDtypeStruct, ...]:
    return jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), jnp.bool_)


def _read_tokenizer(folder: Path, configs: Configs) -> WanTokenizer:
    return WanTokenizer.from_folder(folder, UMT5Config.from_dict(configs["text_encoder"]).vocab_size)


def _write_tokenizer(folder: Path, tokenizer: WanTokenizer) -> None:
    tokenizer.save(folder)


# What diffusers keeps in float32 where the model is loaded in half precision.
FLOAT32_PARAMETERS = (r"(^|/)(time_embedder|scale_shift_table|norm2)(/|$)",)
_TRANSFORMER = Component(
    "diffusers",
    DIFFUSERS_STEM,
    WanTransformerConfig,
    WanTransformer3DModel,
    _transformer_inputs,
    float32_parameters=FLOAT32_PARAMETERS,
)
COMPONENTS: dict[str, Component] = {
    "transformer": _TRANSFORMER,
    "transformer_2": _TRANSFORMER,
    "vae": Component("diffusers", DIFFUSERS_STEM, AutoencoderKLWanConfig, AutoencoderKLWan, _vae_inputs),
    "text_encoder": Component(
        "transformers", TRANSFORMERS_STEM, UMT5Config, UMT5EncoderModel, _text_inputs, "umt5", rename=one_embedding
    ),
}
LAYOUT = Layout(
    class_name="WanPipeline",
    components=COMPONENTS,
    # The same file in all of them; transformers 5 calls the first by the second's name, and the third by the fourth's.
    tokenizers=("T5TokenizerFast", "T5Tokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"),
    read_tokenizer=_read_tokenizer,
    write_tokenizer=_write_tokenizer,
    optional=("transformer_2",),
    # The share of the timesteps from which on `transformer` denoises and below which `transformer_2` does; whether
    # every token has a timestep of its own, which text-to-video gives the same value.
    settings={"boundary_ratio": None, "expand_timesteps": False},
)


def param_shapes(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of `ShapeDtypeStruct` of "transformer", "vae" or "text_encoder" with this config."""
    return folders.param_shapes(COMPONENTS[name], config)
