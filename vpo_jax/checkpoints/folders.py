"""Whole diffusers folders, in and out, in the form of `TextToVideoSDPipeline`.

model_index.json        which class each part is
unet/ vae/ text_encoder/   config.json and safetensors
tokenizer/ scheduler/   files of CLIPTokenizer, scheduler_config.json
vpo_jax.json            optional: the frames, height, width and guidance that the model was made for
"""

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.checkpoints.keys import from_torch, init_shapes, to_torch
from vpo_jax.checkpoints.untrusted import check_layers, load_tokenizer, open_folder, read_defaults
from vpo_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from vpo_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.paths import user_path

PIPELINE_CLASS = "TextToVideoSDPipeline"
DEFAULTS_FILE = "vpo_jax.json"
_DIFFUSERS_VERSION = "0.42.1"  # the release whose form is written
# A tree of ShapeDtypeStruct to the tree of its leaves' shardings.
Place = Callable[[Any], Any]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def _unet_inputs(config: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    side = 2 ** (len(config.block_out_channels) - 1)
    sample = jax.ShapeDtypeStruct((1, 1, side, side, config.in_channels), jnp.float32)
    text = jax.ShapeDtypeStruct((1, 1, config.cross_attention_dim), jnp.float32)
    return sample, jax.ShapeDtypeStruct((1,), jnp.int32), text


def _vae_inputs(config: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    side = config.scale_factor
    return (jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32),)


def _text_inputs(config: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)


@dataclasses.dataclass(frozen=True)
class Component:
    """One part of the pipeline that has weights: its class on both sides and the inputs that `init` wants."""

    library: str
    stem: str
    config: Any
    module: Callable[..., nn.Module]
    inputs: Callable[[Any], tuple[jax.ShapeDtypeStruct, ...]]

    @property
    def class_name(self) -> str:
        return self.module.__name__


COMPONENTS: dict[str, Component] = {
    "unet": Component("diffusers", io.DIFFUSERS_STEM, UNet3DConfig, UNet3DConditionModel, _unet_inputs),
    "vae": Component("diffusers", io.DIFFUSERS_STEM, AutoencoderKLConfig, AutoencoderKL, _vae_inputs),
    "text_encoder": Component("transformers", io.TRANSFORMERS_STEM, CLIPTextConfig, CLIPTextModel, _text_inputs),
}
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_WRITTEN = {"model_index.json", "README.md", DEFAULTS_FILE, *COMPONENTS, "tokenizer", "scheduler"}


@dataclasses.dataclass(frozen=True)
class PipelineParts:
    """What a diffusers folder holds.

    Attributes:
        configs: parsed JSON of "unet", "vae", "text_encoder" (config.json) and "scheduler".
        params: parameter trees of "unet", "vae" and "text_encoder".
        tokenizer: transformers' CLIPTokenizer; None only in parts that are yet to be completed.
        defaults: vpo_jax.json, or {}.
    """

    configs: Mapping[str, Mapping[str, Any]]
    params: Mapping[str, Any]
    tokenizer: Any
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def param_shapes(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of `ShapeDtypeStruct` that the part `name` ("unet", "vae", "text_encoder") has for this config."""
    part = COMPONENTS[name]
    parsed = part.config.from_dict(config)
    return init_shapes(part.module(parsed), *part.inputs(parsed))


def read_component(
    folder: str | Path, name: str, dtype: Any = jnp.float32, place: Place | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and parameters of one part, from its own folder (".../unet").

    Args:
        folder: holds config.json and the safetensors.
        name: "unet", "vae" or "text_encoder".
        dtype: of the parameters.
        place: where they go; None is the host, as numpy arrays.

    Raises:
        UserError: another class, or anything that `from_torch` and `read_weights` refuse.
    """
    folder = Path(folder)
    config = io.read_json(folder / "config.json")
    _check_class(config, COMPONENTS[name], folder / "config.json")
    state = io.read_weights(folder, COMPONENTS[name].stem)
    check_layers(config, len(state), str(folder))
    shapes = param_shapes(name, config)
    return config, from_torch(state, shapes, str(folder), dtype, place and place(shapes))


def read_pipeline(path: str | Path, dtype: Any = jnp.float32, place: Place | None = None) -> PipelineParts:
    """All parts of a diffusers folder, or of a model on the hub when there is a network.

    Args:
        path: a folder, or a hub id ("owner/name").
        dtype: of the parameters, whatever dtype the files have.
        place: where they go; None is the host, as numpy arrays.

    Raises:
        UserError: one line that names the file and the fix.
    """
    root = local_folder(path)
    _check_index(root)
    configs: dict[str, Mapping[str, Any]] = {}
    params = {}
    for name in COMPONENTS:
        configs[name], params[name] = read_component(root / name, name, dtype, place)
    configs["scheduler"] = io.read_json(root / "scheduler" / "scheduler_config.json")
    defaults = read_defaults(root / DEFAULTS_FILE)
    tokenizer = read_tokenizer(root / "tokenizer", CLIPTextConfig.from_dict(configs["text_encoder"]))
    return PipelineParts(configs, params, tokenizer, defaults)


def write_pipeline(
    path: str | Path,
    parts: PipelineParts,
    dtypes: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a folder that `TextToVideoSDPipeline.from_pretrained` loads.

    Everything goes into a hidden folder beside `path`, which is renamed at the end: a folder of that name is
    always whole. A pipeline that is already there is replaced.

    Args:
        path: the folder to make.
        parts: as `read_pipeline` returns. A model or tokenizer that is not among them is left out of the folder,
            which can be loaded once it has been copied there.
        dtypes: "float32", "float16" or "bfloat16" for each of "unet", "vae", "text_encoder"; float32 if left out.
            A half-precision text encoder makes diffusers fail unless `torch_dtype` is passed to it.
        max_shard_bytes: weights larger than this are written in shards.

    Raises:
        UserError: the name is taken by something else, a value does not fit the dtype, or the disk refuses.
    """
    path = user_path(path, "path").resolve()
    check_target(path)
    partial = path.parent / f".{path.name}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name in parts.params:
            wanted = (dtypes or {}).get(name, "float32")
            _write_component(partial / name, name, parts, wanted, max_shard_bytes)
        _write_json(partial / "scheduler" / "scheduler_config.json", parts.configs["scheduler"])
        if parts.tokenizer is not None:
            _write_tokenizer(partial / "tokenizer", parts.tokenizer)
        if parts.defaults:
            _write_json(partial / DEFAULTS_FILE, parts.defaults)
        _write_json(partial / "model_index.json", _index(parts))
        _swap(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); free space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def beyond_diffusers(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What of a model diffusers cannot say, in words: it keeps the fields, ignores them and makes other videos."""
    missing = []
    if configs.get("unet", {}).get("fps_cond"):
        missing.append("embedding of the frame rate (unet/config.json: fps_cond, fps)")
    if configs.get("scheduler", {}).get("use_scale"):
        missing.append("scaled schedule (scheduler_config.json: use_scale, scale_b)")
    return missing


def local_folder(path: str | Path) -> Path:
    """The folder itself, or where the hub's copy of it lies; downloads what the pipeline reads, and no pickles.

    Raises:
        UserError: there is no such folder and no such model that can be reached.
    """
    root = open_folder(path)
    if root.is_dir():
        return root
    if root.is_file():
        if root.suffix in io.PICKLES:
            raise io.refuse_pickle(root)
        raise UserError(f"{path}: a file; give the diffusers folder that has model_index.json in it")
    if not _HUB_ID.fullmatch(str(path)):
        raise UserError(f"{path}: no such folder; give a diffusers folder or a hub id (owner/name)")
    from huggingface_hub import snapshot_download  # it takes a second to import and is seldom wanted

    wanted = ["model_index.json", DEFAULTS_FILE, "*/*.json", "*/*.safetensors", "tokenizer/*.txt"]
    try:
        root = Path(snapshot_download(str(path), allow_patterns=wanted, ignore_patterns=["*.fp16*", "*non_ema*"]))
        if not all(any((root / name).glob("*.safetensors")) for name in COMPONENTS):
            root = Path(snapshot_download(str(path), allow_patterns=wanted))
    except (OSError, ValueError) as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(
            f"{path}: no such folder, and the hub gave no such model ({reason}); check the path, or download it first"
        ) from error
    return root


def read_tokenizer(folder: Path, text_config: CLIPTextConfig) -> Any:
    """transformers' CLIPTokenizer from its folder, never longer than the text encoder's positions.

    Raises:
        UserError: files are missing or broken, or it has more tokens than the text encoder.
    """
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZER_FILES):
        raise UserError(f"{folder}: no tokenizer; tokenizer.json, or vocab.json and merges.txt, belong there")
    from transformers import CLIPTokenizer  # it takes seconds to import

    tokenizer = load_tokenizer(lambda: CLIPTokenizer.from_pretrained(str(folder)), folder, "CLIPTokenizer")
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)  # how it was read; transformers would write it into every copy
    if len(tokenizer) > text_config.vocab_size:
        raise UserError(
            f"{folder}: {len(tokenizer)} tokens, but text_encoder.vocab_size is {text_config.vocab_size}; "
            "use the tokenizer that belongs to this text encoder"
        )
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float) or not longest >= 1:
        raise UserError(f"{folder}: model_max_length is {longest!r:.60}, no number of tokens; copy the tokenizer again")
    tokenizer.model_max_length = min(tokenizer.model_max_length, text_config.max_position_embeddings)
    return tokenizer


def _check_index(root: Path) -> None:
    file = root / "model_index.json"
    if not file.is_file():
        pickles = sorted(p for p in root.iterdir() if p.suffix in io.PICKLES)
        if pickles:
            raise io.refuse_pickle(pickles[0])
        raise UserError(f"{root}: not a diffusers pipeline (no model_index.json); give the folder that has it")
    index = io.read_json(file)
    if index.get("_class_name") != PIPELINE_CLASS:
        found = index.get("_class_name")
        raise UserError(f"{file}: _class_name is {found!r}; only {PIPELINE_CLASS} can be loaded, give such a model")
    expected = {name: (part.class_name,) for name, part in COMPONENTS.items()} | {"tokenizer": _TOKENIZERS}
    for name, classes in expected.items():
        entry = index.get(name)
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if found not in classes:
            raise UserError(f"{file}: {name} is {found!r}; only {classes[0]} can be loaded, give such a model")
    known = {*expected, "scheduler"}
    for name, entry in index.items():
        if name not in known and not name.startswith("_") and entry not in (None, [None, None]):
            raise UserError(f"{file}: {name} is a part that {PIPELINE_CLASS} does not have; remove it")


def _check_class(config: Mapping[str, Any], part: Component, file: Path) -> None:
    if part.library == "diffusers":
        found = config.get("_class_name", part.class_name)
    else:
        named = config.get("architectures") or [part.class_name]
        found = named[0] if isinstance(named, list) else named
    if found != part.class_name:
        raise UserError(f"{file}: the architecture is {found!r}; only {part.class_name} can be loaded here")


def check_target(path: Path) -> None:
    """Raises UserError for a folder that `write_pipeline` would not write over; writes nothing."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: a file is in the way; choose another folder")
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()}
        # A README.md without a pipeline beside it is somebody's own.
        foreign = sorted(names - (_WRITTEN if "model_index.json" in names else _WRITTEN - {"README.md"}))
        if foreign:
            raise UserError(f"{path}: holds {foreign[0]}, which no pipeline has; choose an empty or a new folder")


def _write_component(folder: Path, name: str, parts: PipelineParts, dtype: str, max_shard_bytes: int) -> None:
    part = COMPONENTS[name]
    config = dict(copy.deepcopy(parts.configs[name]))
    if part.library == "diffusers":
        config = {"_class_name": part.class_name, "_diffusers_version": _DIFFUSERS_VERSION, **config}
    else:
        config = {"architectures": [part.class_name], "model_type": "clip_text_model", **config}
        # transformers 5 makes the model in the dtype that the config names, not in the tensors' own
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    _write_json(folder / "config.json", config)
    io.write_weights(folder, part.stem, _cast(to_torch(parts.params[name]), dtype, name), max_shard_bytes)


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    # A tokenizer that was called remembers how it padded and cut, and would write that into the folder.
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(str(folder))


def _cast(state: dict[str, np.ndarray], dtype: str, where: str) -> dict[str, np.ndarray]:
    for key, array in state.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            continue
        with np.errstate(over="ignore"):
            state[key] = array.astype(jnp.dtype(dtype), copy=False)
        if not np.isfinite(state[key]).all():
            raise UserError(
                f"{where}.{key}: NaN, infinite or too large for {dtype}; nothing was written, save in float32"
            )
    return state


def _index(parts: PipelineParts) -> dict[str, Any]:
    scheduler = parts.configs["scheduler"].get("_class_name", "DDIMScheduler")
    return {
        "_class_name": PIPELINE_CLASS,
        "_diffusers_version": _DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        **{name: [part.library, part.class_name] for name, part in COMPONENTS.items()},
    }


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _swap(partial: Path, path: Path) -> None:
    # Moved, not renamed: a bucket's mount may refuse to rename a folder, and then it is copied.
    if not path.exists():
        shutil.move(partial, path)
        return
    # A folder cannot be renamed over one that is not empty, so the old one steps aside first.
    previous = path.parent / f".{path.name}.previous"
    shutil.rmtree(previous, ignore_errors=True)
    shutil.move(path, previous)
    shutil.move(partial, path)
    shutil.rmtree(previous, ignore_errors=True)
