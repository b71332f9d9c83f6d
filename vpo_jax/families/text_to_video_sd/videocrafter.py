"""VideoCrafter2's one file (the lvdm layout) as the parts of a diffusers pipeline.

The file holds three models under three prefixes: the denoiser, Stable Diffusion's autoencoder and OpenCLIP's text
encoder. Each table below pairs names of modules; below a module the names are the same on both sides unless a table
says otherwise. Sizes are read off the tensors.

Source of the names and constants: AILab-CVC/VideoCrafter, lvdm/ and configs/inference_t2v_512_v2.0.yaml.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.checkpoints.folders import PipelineParts
from vpo_jax.checkpoints.keys import from_torch, torch_shapes
from vpo_jax.families.text_to_video_sd.layout import LAYOUT, param_shapes
from vpo_jax.families.text_to_video_sd.published import MODELSCOPE
from vpo_jax.runtime.errors import UserError

State = dict[str, np.ndarray]

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.model.",
}
# The schedule of Stable Diffusion 2, as in MODELSCOPE, and its own factors of the latents.
SCHEDULER = {
    **MODELSCOPE["scheduler"],
    "timestep_spacing": "leading",
    "use_scale": True,
    "scale_b": 0.7,
}
# What its own script samples with (scripts/run_text2video.sh): 512x320 at 28 frames a second.
DEFAULTS = {"num_frames": 16, "height": 320, "width": 512, "guidance_scale": 12.0}
_FPS = 28
_INIT_HEADS = 8  # of init_attn, which tells the size of a head
_GROUPS = 32
_HEAD_DIM = 64  # of OpenCLIP's towers

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TEMPORAL_CONV = "temopral_conv"  # spelled so
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_TEXT_LAYER = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
# Of OpenCLIP and not of the text encoder up to its penultimate layer.
_TEXT_UNUSED = re.compile(r"^(text_projection|logit_scale|attn_mask$|visual\.|transformer\.resblocks\.(\d+)\.)")
_VAE_UNUSED = re.compile(r"^loss\.")


def read_videocrafter(file: str | Path, dtype: Any = jnp.float32) -> PipelineParts:
    """The parts that VideoCrafter2's safetensors file holds, without a tokenizer.

    Args:
        file: the whole checkpoint, or the denoiser alone, with or without its prefix.
        dtype: of the parameters.

    Raises:
        UserError: a pickle, another layout, or tensors that are missing, extra, misshapen or not finite.
    """
    file = Path(file)
    if file.suffix in io.PICKLES:
        raise io.refuse_pickle(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file; give VideoCrafter2's checkpoint as safetensors")
    state = io.read_file(file)
    if "input_blocks.0.0.weight" in state:
        state = {PREFIXES["unet"] + name: array for name, array in state.items()}
    found = {
        name: {key.removeprefix(prefix): array for key, array in state.items() if key.startswith(prefix)}
        for name, prefix in PREFIXES.items()
    }
    if "init_attn.0.proj_in.weight" not in found["unet"] or "out.2.weight" not in found["unet"]:
        raise UserError(f"{file}: not VideoCrafter2's layout (no {PREFIXES['unet']}init_attn); give its T2V checkpoint")
    configs: dict[str, Mapping[str, Any]] = {"scheduler": SCHEDULER}
    params = {}
    for name, part in found.items():
        if part:
            where = f"{file}: {name}"
            try:
                configs[name] = _CONFIGS[name](part)
                renamed = _RENAMES[name](part, configs[name])
            except (KeyError, IndexError) as error:
                raise UserError(f"{where}: {error} is missing; copy or convert the file again") from error
            shapes = param_shapes(name, configs[name])
            params[name] = from_torch(_squeezed(renamed, shapes), shapes, where, dtype)
    return PipelineParts(LAYOUT, configs, params, None, DEFAULTS)


# ==== Denoiser ========================================================================================================


def unet_config(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """unet/config.json of lvdm's denoiser `state` (names without prefix)."""
    ends = [n for n in range(_count(state, "input_blocks")) if f"input_blocks.{n}.0.op.weight" in state]
    first = [1, *(n + 1 for n in ends)]
    widths = [state[f"input_blocks.{n}.0.in_layers.2.weight"].shape[0] for n in first]
    attends = [f"input_blocks.{n}.1.norm.weight" in state for n in first]
    texts = [key for key in state if key.startswith("middle_block.1.") and key.endswith("attn2.to_k.weight")]
    return {
        "_class_name": "UNet3DConditionModel",
        "sample_size": [DEFAULTS["height"] // 8, DEFAULTS["width"] // 8],
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock3D" if with_text else "DownBlock3D" for with_text in attends],
        "up_block_types": ["CrossAttnUpBlock3D" if with_text else "UpBlock3D" for with_text in reversed(attends)],
        "layers_per_block": ends[0] - 1 if ends else _count(state, "input_blocks") - 1,
        "attention_head_dim": state["init_attn.0.proj_in.weight"].shape[0] // _INIT_HEADS,
        "cross_attention_dim": state[texts[0]].shape[1],
        "norm_num_groups": _GROUPS,
        "fps_cond": "fps_embedding.0.weight" in state,
        "fps": _FPS,
    }


def unet_modules(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(lvdm's module, diffusers' module) of every module that has a name of its own."""
    for ours, theirs in (("time_embedding", "time_embed"), ("fps_embedding", "fps_embedding")):
        yield f"{theirs}.0", f"{ours}.linear_1"
        yield f"{theirs}.2", f"{ours}.linear_2"
    yield "input_blocks.0.0", "conv_in"
    yield "init_attn.0", "transformer_in"
    yield "out.0", "conv_norm_out"
    yield "out.2", "conv_out"
    layers, last = config["layers_per_block"], len(config["block_out_channels"]) - 1
    n = 1
    for i, kind in enumerate(config["down_block_types"]):
        for layer in range(layers):
            yield from _layer(f"input_blocks.{n}", f"down_blocks.{i}", layer, "CrossAttn" in kind)
            n += 1
        if i < last:
            yield f"input_blocks.{n}.0.op", f"down_blocks.{i}.downsamplers.0.conv"
            n += 1
    yield from _layer("middle_block", "mid_block", 0, True)
    yield from _resnet("middle_block.3", "mid_block", 1)
    n = 0
    for i, kind in enumerate(config["up_block_types"]):
        for layer in range(layers + 1):
            yield from _layer(f"output_blocks.{n}", f"up_blocks.{i}", layer, "CrossAttn" in kind)
            n += 1
        if i < last:
            place = 3 if "CrossAttn" in kind else 1
            yield f"output_blocks.{n - 1}.{place}.conv", f"up_blocks.{i}.upsamplers.0.conv"


def _layer(theirs: str, ours: str, layer: int, attends: bool) -> Iterator[tuple[str, str]]:
    yield from _resnet(f"{theirs}.0", ours, layer)
    if attends:
        yield f"{theirs}.1", f"{ours}.attentions.{layer}"
        yield f"{theirs}.2", f"{ours}.temp_attentions.{layer}"


def _resnet(theirs: str, ours: str, layer: int) -> Iterator[tuple[str, str]]:
    for their_part, our_part in _RESNET.items():
        yield f"{theirs}.{their_part}", f"{ours}.resnets.{layer}.{our_part}"
    yield f"{theirs}.{_TEMPORAL_CONV}", f"{ours}.temp_convs.{layer}"


def _rename_unet(state: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> State:
    return _renamed(state, dict(unet_modules(config)))


# ==== Autoencoder =====================================================================================================


def vae_config(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """vae/config.json of Stable Diffusion's autoencoder `state` (names without prefix)."""
    stages = _count(state, "encoder.down")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "latent_channels": state["post_quant_conv.weight"].shape[0],
        "block_out_channels": [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(stages)],
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "layers_per_block": _count(state, "encoder.down.0.block"),
        "norm_num_groups": _GROUPS,
        "act_fn": "silu",
        "sample_size": 512,
        "scaling_factor": 0.18215,
    }


def vae_modules(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(the file's module, diffusers' module) of the autoencoder."""
    stages = len(config["block_out_channels"])
    for name in ("quant_conv", "post_quant_conv"):
        yield name, name
    for tower in ("encoder", "decoder"):
        for name, ours in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
            yield f"{tower}.{name}", f"{tower}.{ours}"
        for name, ours in _VAE_ATTENTION.items():
            yield f"{tower}.mid.attn_1.{name}", f"{tower}.mid_block.attentions.0.{ours}"
        for i in (0, 1):
            yield from _vae_resnet(f"{tower}.mid.block_{i + 1}", f"{tower}.mid_block.resnets.{i}")
    for i in range(stages):
        up = stages - 1 - i  # counted from the other end
        yield f"encoder.down.{i}.downsample.conv", f"encoder.down_blocks.{i}.downsamplers.0.conv"
        yield f"decoder.up.{i}.upsample.conv", f"decoder.up_blocks.{up}.upsamplers.0.conv"
        for j in range(config["layers_per_block"]):
            yield from _vae_resnet(f"encoder.down.{i}.block.{j}", f"encoder.down_blocks.{i}.resnets.{j}")
        for j in range(config["layers_per_block"] + 1):
            yield from _vae_resnet(f"decoder.up.{i}.block.{j}", f"decoder.up_blocks.{up}.resnets.{j}")


def _vae_resnet(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for their_part, our_part in _VAE_RESNET.items():
        yield f"{theirs}.{their_part}", f"{ours}.{our_part}"


def _rename_vae(state: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> State:
    used = {key: array for key, array in state.items() if not _VAE_UNUSED.match(key)}
    return _renamed(used, dict(vae_modules(config)))


# ==== Text encoder ====================================================================================================


def text_config(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """text_encoder/config.json of OpenCLIP's text tower `state`, without its last layer: lvdm reads the one before."""
    vocabulary, width = state["token_embedding.weight"].shape
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _count(state, "transformer.resblocks") - 1,
        "num_attention_heads": max(1, width // _HEAD_DIM),
        "max_position_embeddings": state["positional_embedding"].shape[0],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 512,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def text_modules(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(OpenCLIP's module, transformers' module) of the text encoder."""
    yield "token_embedding", "embeddings.token_embedding"
    yield "ln_final", "final_layer_norm"
    for i in range(config["num_hidden_layers"]):
        for theirs, ours in _TEXT_LAYER.items():
            yield f"transformer.resblocks.{i}.{theirs}", f"encoder.layers.{i}.{ours}"


def _rename_text(state: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> State:
    depth = config["num_hidden_layers"]
    renamed = _renamed(
        {key: array for key, array in state.items() if not _is_unused_text(key, depth)}, dict(text_modules(config))
    )
    renamed["embeddings.position_embedding.weight"] = renamed.pop("positional_embedding")
    for i in range(depth):
        for leaf in ("weight", "bias"):
            joint = renamed.pop(f"transformer.resblocks.{i}.attn.in_proj_{leaf}")
            for name, part in zip("qkv", np.split(joint, 3), strict=True):
                renamed[f"encoder.layers.{i}.self_attn.{name}_proj.{leaf}"] = part
    return renamed


def _is_unused_text(key: str, depth: int) -> bool:
    match = _TEXT_UNUSED.match(key)
    return match is not None and (match.group(2) is None or int(match.group(2)) >= depth)


# ==== Names and shapes ================================================================================================

_CONFIGS = {"unet": unet_config, "vae": vae_config, "text_encoder": text_config}
_RENAMES = {"unet": _rename_unet, "vae": _rename_vae, "text_encoder": _rename_text}


def _renamed(state: Mapping[str, np.ndarray], modules: Mapping[str, str]) -> State:
    """The state under diffusers' names; a key that no module is the start of keeps its own, and is refused later."""
    renamed = {}
    for key, array in state.items():
        head, rest = key, ""
        while head and head not in modules:
            head, _, part = head.rpartition(".")
            rest = f".{part}{rest}"
        renamed[modules[head] + rest if head else key] = array
    return renamed


def _squeezed(state: State, shapes: Any) -> State:
    """The state with convolutions of window 1 as the dense layers that they are."""
    wanted = torch_shapes(shapes)
    for key, array in state.items():
        shape = wanted.get(key, array.shape)
        if array.ndim > len(shape) and array.shape == (*shape, *(1,) * (array.ndim - len(shape))):
            state[key] = array.reshape(shape)
    return state


def _count(state: Mapping[str, np.ndarray], name: str) -> int:
    """How many modules `name.0`, `name.1`, ... there are."""
    start = len(name) + 1
    return 1 + max((int(key[start:].split(".")[0]) for key in state if key.startswith(f"{name}.")), default=-1)
