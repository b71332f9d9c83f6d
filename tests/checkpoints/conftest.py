"""A tiny text-to-video pipeline, made without torch."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from vpo_jax.checkpoints.folders import PipelineParts, write_pipeline
from vpo_jax.families.table import read_pipeline
from vpo_jax.families.text_to_video_sd.layout import LAYOUT, param_shapes

CONFIGS = {
    "unet": {
        "_class_name": "UNet3DConditionModel",
        "sample_size": 4,
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock3D", "CrossAttnDownBlock3D"],
        "up_block_types": ["CrossAttnUpBlock3D", "UpBlock3D"],
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
        "cross_attention_dim": 12,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
        "scaling_factor": 0.5,
    },
    "text_encoder": {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "torch_dtype": "float16",
        "vocab_size": 514,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": 512,
        "eos_token_id": 513,
    },
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
}


def _byte_vocabulary() -> dict[str, int]:
    """CLIP's alphabet: each byte as a printable character, alone and at the end of a word."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    words = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}


@pytest.fixture(scope="session")
def parts() -> PipelineParts:
    """Random weights, none of them rounded to half precision."""
    from transformers import CLIPTokenizer

    rng = np.random.default_rng(0)
    params = {
        name: jax.tree.map(
            lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32), param_shapes(name, CONFIGS[name])
        )
        for name in ("unet", "vae", "text_encoder")
    }
    tokenizer = CLIPTokenizer(vocab=_byte_vocabulary(), merges=[], model_max_length=16)
    return PipelineParts(LAYOUT, CONFIGS, params, tokenizer, {"num_frames": 3, "guidance_scale": 2.0})


@pytest.fixture(scope="session")
def written(parts, tmp_path_factory) -> Path:
    """The parts as a float32 folder. Read only: copy it before breaking it."""
    folder = tmp_path_factory.mktemp("written") / "pipeline"
    write_pipeline(folder, parts)
    return folder


@pytest.fixture
def broken(written, tmp_path) -> Path:
    """A copy to break."""
    import shutil

    return Path(shutil.copytree(written, tmp_path / "model"))


@pytest.fixture
def refusal(broken):
    """The message with which reading the broken copy is refused; it has to be one line."""
    from vpo_jax.runtime.errors import UserError

    def read() -> str:
        with pytest.raises(UserError) as caught:
            read_pipeline(broken)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return read


@pytest.fixture
def edit_json():
    """Change keys of a JSON file; None removes one."""

    def edit(file: Path, **changes) -> None:
        value = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))

    return edit
