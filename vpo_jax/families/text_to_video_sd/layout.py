"""The diffusers folder of a TextToVideoSDPipeline: a video UNet, Stable Diffusion's autoencoder and a CLIP encoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vpo_jax.checkpoints import folders
from vpo_jax.checkpoints.folders import Component, Configs, Layout
from vpo_jax.checkpoints.safetensors_io import DIFFUSERS_STEM, TRANSFORMERS_STEM
from vpo_jax.checkpoints.tokenizers import read_tokenizer, write_tokenizer
from vpo_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from vpo_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig


def _unet_inputs(config: UNet3DConfig) -> tuple[jax.ShapeDtypeStruct, ...]:
    side = 2 ** (len(config.block_out_channels) - 1)
    sample = jax.ShapeDtypeStruct((1, 1, side, side, config.in_channels), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 1, config.cross_attention_dim), jnp.float32)
    return sample, jax.ShapeDtypeStruct((1,), jnp.int32), text


def _vae_inputs(config: AutoencoderKLConfig) -> tuple[jax.ShapeDtypeStruct, ...]:
    side = config.scale_factor
    return (jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32),)


def _text_inputs(config: CLIPTextConfig) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)


def _read_tokenizer(folder: Path, configs: Configs) -> Any:
    text = CLIPTextConfig.from_dict(configs["text_encoder"])
    return read_tokenizer(folder, "CLIPTokenizer", text.vocab_size, text.max_position_embeddings)


COMPONENTS: dict[str, Component] = {
    "unet": Component("diffusers", DIFFUSERS_STEM, UNet3DConfig, UNet3DConditionModel, _unet_inputs),
    "vae": Component("diffusers", DIFFUSERS_STEM, AutoencoderKLConfig, AutoencoderKL, _vae_inputs),
    "text_encoder": Component(
        "transformers", TRANSFORMERS_STEM, CLIPTextConfig, CLIPTextModel, _text_inputs, "clip_text_model"
    ),
}
LAYOUT = Layout(
    class_name="TextToVideoSDPipeline",
    components=COMPONENTS,
    tokenizers=("CLIPTokenizer", "CLIPTokenizerFast"),
    read_tokenizer=_read_tokenizer,
    write_tokenizer=write_tokenizer,
)


def param_shapes(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of `ShapeDtypeStruct` of "unet", "vae" or "text_encoder" with this config."""
    return folders.param_shapes(COMPONENTS[name], config)
