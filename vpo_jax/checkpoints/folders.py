"""Whole diffusers folders, in and out, as the `Layout` of a model family describes them.

model_index.json        which class each part is
NAME/ for each component   config.json and safetensors
tokenizer/ scheduler/   the tokenizer's files, scheduler_config.json
vpo_jax.json            optional: the frames, height, width and guidance that the model was made for
"""

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.checkpoints.keys import from_torch, init_shapes, to_torch
from vpo_jax.checkpoints.untrusted import check_layers, open_folder, read_defaults
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.paths import user_path
from vpo_jax.runtime.stored import Stored

DEFAULTS_FILE = "vpo_jax.json"
_DIFFUSERS_VERSION = "0.42.1"  # the release whose form is written
# A tree of ShapeDtypeStruct to the tree of its leaves' shardings; or they stay where they are, see `Stored`.
Place = Callable[[Any], Any] | Literal["disk"]
# Parsed config.json by component, and scheduler_config.json as "scheduler".
Configs = Mapping[str, Mapping[str, Any]]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Component:
    """One part of a pipeline that has weights.

    Attributes:
        library: "diffusers" or "transformers": who loads it there, and how its config.json names its class.
        stem: the name of its weights' file, without ".safetensors".
        config: class with `from_dict(mapping)`, the parsed config.json.
        module: linen class, made as `module(config)`; its name is the library's.
        inputs: config -> what `module.init` takes, as shapes.
        model_type: of a transformers config.
        float32_parameters: patterns of the paths of those that are read as float32 whatever dtype the others have.
        rename: (state dict, where it was read) -> the same under one set of names, where files have several.
    """

    library: str
    stem: str
    config: Any
    module: Callable[..., nn.Module]
    inputs: Callable[[Any], tuple[jax.ShapeDtypeStruct, ...]]
    model_type: str = ""
    float32_parameters: tuple[str, ...] = ()
    rename: Callable[[dict[str, np.ndarray], str], dict[str, np.ndarray]] | None = None

    @property
    def class_name(self) -> str:
        """The library's class."""
        return self.module.__name__


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the diffusers folder of a model family is made of.

    Attributes:
        class_name: `_class_name` of model_index.json.
        components: folder's name -> what lies there.
        tokenizers: transformers' classes that can be read; the first is the one that is written.
        read_tokenizer: (tokenizer/, configs) -> tokenizer.
        write_tokenizer: (tokenizer/, tokenizer), writes its files.
        optional: components that a folder may lack; model_index.json then has null for them.
        settings: entries of model_index.json that are values and not parts, with their defaults. What a folder says
            of them, and of its tokenizer's class, is `configs["model_index"]`.
    """

    class_name: str
    components: Mapping[str, Component]
    tokenizers: tuple[str, ...]
    read_tokenizer: Callable[[Path, Configs], Any]
    write_tokenizer: Callable[[Path, Any], None]
    optional: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class PipelineParts:
    """What a diffusers folder holds.

    Attributes:
        layout: the form of the folder.
        configs: parsed JSON of every component (config.json) and of "scheduler".
        params: parameter trees of the components.
        tokenizer: None only in parts that are yet to be completed.
        defaults: vpo_jax.json, or {}.
    """

    layout: Layout
    configs: Configs
    params: Mapping[str, Any]
    tokenizer: Any
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def param_shapes(component: Component, config: Mapping[str, Any]) -> dict[str, Any]:
    """The tree of `ShapeDtypeStruct` that the component has for this config."""
    parsed = component.config.from_dict(config)
    return init_shapes(component.module(parsed), *component.inputs(parsed))


def read_component(
    folder: str | Path, component: Component, dtype: Any = jnp.float32, place: Place | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and parameters of one component, from its own folder (".../vae").

    Args:
        folder: holds config.json and the safetensors.
        component: what should lie there.
        dtype: of the parameters.
        place: where they go; None is the host, as numpy arrays; "disk" leaves them there, as `Stored`.

    Raises:
        UserError: another class, or anything that `from_torch` and `read_weights` refuse.
    """
    folder = Path(folder)
    config = io.read_json(folder / "config.json")
    _check_class(config, component, folder / "config.json")
    unchanged = io.watch_weights(folder, component.stem) if place == "disk" else None
    state = io.read_weights(folder, component.stem)
    if component.rename is not None:
        state = component.rename(state, str(folder))
    check_layers(config, len(state), str(folder))
    shapes = param_shapes(component, config)
    places = place(shapes) if callable(place) else None
    return config, from_torch(state, shapes, str(folder), dtype, places, component.float32_parameters, unchanged)


def read_index(root: Path) -> dict[str, Any]:
    """model_index.json of a folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    file = root / "model_index.json"
    if not file.is_file():
        pickles = sorted(p for p in root.iterdir() if p.suffix in io.PICKLES)
        if pickles:
            raise io.refuse_pickle(pickles[0])
        raise UserError(f"{root}: not a diffusers pipeline (no model_index.json); give the folder that has it")
    return io.read_json(file)


def read_parts(root: Path, layout: Layout, dtype: Any = jnp.float32, place: Place | None = None) -> PipelineParts:
    """All parts of a folder on disk.

    Args:
        root: holds model_index.json of the layout's class.
        layout: what should lie there.
        dtype: of the parameters, whatever dtype the files have.
        place: where they go; None is the host, as numpy arrays; "disk" leaves them there, as `Stored`.

    Raises:
        UserError: one line that names the file and the fix.
    """
    present, configs = _read_index_of(root, layout)
    params = {}
    for name in present:
        configs[name], params[name] = read_component(root / name, layout.components[name], dtype, place)
    configs["scheduler"] = _read_scheduler(root)
    tokenizer = layout.read_tokenizer(root / "tokenizer", configs)
    return PipelineParts(layout, configs, params, tokenizer, read_defaults(root / DEFAULTS_FILE))


def read_shapes(root: Path, layout: Layout) -> PipelineParts:
    """The parts of a folder of which only the config files are there: `params` are shapes, and no tokenizer.

    Raises:
        UserError: a config that is absent or that the models refuse.
    """
    present, configs = _read_index_of(root, layout)
    configs |= {name: io.read_json(root / name / "config.json") for name in present}
    configs["scheduler"] = _read_scheduler(root)
    return shapes_of_configs(layout, configs, read_defaults(root / DEFAULTS_FILE))


def shapes_of_configs(layout: Layout, configs: Configs, defaults: Mapping[str, Any] | None = None) -> PipelineParts:
    """The parts that have these configs, with shapes for parameters and no tokenizer."""
    present = [name for name in layout.components if name in configs or name not in layout.optional]
    params = {name: param_shapes(layout.components[name], configs[name]) for name in present}
    return PipelineParts(layout, configs, params, None, defaults or {})


def _read_scheduler(root: Path) -> dict[str, Any]:
    return io.read_json(root / "scheduler" / "scheduler_config.json")


def write_pipeline(
    path: str | Path,
    parts: PipelineParts,
    dtypes: Mapping[str, str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a folder that the layout's class of diffusers loads by `from_pretrained`.

    Everything goes into a hidden folder beside `path`, which is renamed at the end: a folder of that name is
    always whole. A pipeline that is already there is replaced.

    Args:
        path: the folder to make.
        parts: as `read_parts` returns. A model or tokenizer that is not among them is left out of the folder,
            which can be loaded once it has been copied there.
        dtypes: "float32", "float16" or "bfloat16" by component; float32 if left out.
            A half-precision text encoder makes diffusers fail unless `torch_dtype` is passed to it.
        max_shard_bytes: weights larger than this are written in shards.

    Raises:
        UserError: the name is taken by something else, a value does not fit the dtype, or the disk refuses.
    """
    path = user_path(path, "path").resolve()
    check_target(path, parts.layout)
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
            parts.layout.write_tokenizer(partial / "tokenizer", parts.tokenizer)
        if parts.defaults:
            _write_json(partial / DEFAULTS_FILE, parts.defaults)
        _write_json(partial / "model_index.json", _index(parts))
        _swap(partial, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); free space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
        models = [config.parent for config in root.glob("*/config.json")]
        if not models or not all(any(model.glob("*.safetensors")) for model in models):
            root = Path(snapshot_download(str(path), allow_patterns=wanted))
    except (OSError, ValueError) as error:
        reason = str(error).split("\n", 1)[0]
        raise UserError(
            f"{path}: no such folder, and the hub gave no such model ({reason}); check the path, or download it first"
        ) from error
    return root


def _read_index_of(root: Path, layout: Layout) -> tuple[list[str], dict[str, Mapping[str, Any]]]:
    """The components that a folder has, and its settings as configs: {} where the layout knows none."""
    file, index = root / "model_index.json", read_index(root)
    if (kind := index.get("_class_name")) != layout.class_name:
        raise UserError(f"{file}: _class_name is {kind!r}, but {layout.class_name} belongs here")
    classes_of = {name: (part.class_name,) for name, part in layout.components.items()}
    expected = {**classes_of, "tokenizer": layout.tokenizers}
    present = []
    for name, classes in expected.items():
        entry = index.get(name)
        if name in layout.optional and entry in (None, [None, None]):
            continue
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if found not in classes:
            raise UserError(f"{file}: {name} is {found!r}; only {classes[0]} can be loaded, give such a model")
        if name in layout.components:
            present.append(name)
    known = {*expected, *layout.settings, "scheduler"}
    for name, entry in index.items():
        if name not in known and not name.startswith("_") and entry not in (None, [None, None]):
            raise UserError(f"{file}: {name} is a part that {layout.class_name} does not have; remove it")
    if not layout.settings:
        return present, {}
    # The class of the tokenizer too: transformers' classes read the same file differently.
    values = {name: index.get(name, value) for name, value in layout.settings.items()}
    return present, {"model_index": {**values, "tokenizer": index["tokenizer"]}}


def _check_class(config: Mapping[str, Any], part: Component, file: Path) -> None:
    if part.library == "diffusers":
        found = config.get("_class_name", part.class_name)
    else:
        named = config.get("architectures") or [part.class_name]
        found = named[0] if isinstance(named, list) else named
    if found != part.class_name:
        raise UserError(f"{file}: the architecture is {found!r}; only {part.class_name} can be loaded here")


def check_target(path: Path, layout: Layout) -> None:
    """Raises UserError for a folder that `write_pipeline` would not write over; writes nothing."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: a file is in the way; choose another folder")
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()}
        written = {"model_index.json", "README.md", DEFAULTS_FILE, *layout.components, "tokenizer", "scheduler"}
        # A README.md without a pipeline beside it is somebody's own.
        foreign = sorted(names - (written if "model_index.json" in names else written - {"README.md"}))
        if foreign:
            raise UserError(f"{path}: holds {foreign[0]}, which no pipeline has; choose an empty or a new folder")


def _write_component(folder: Path, name: str, parts: PipelineParts, dtype: str, max_shard_bytes: int) -> None:
    part = parts.layout.components[name]
    config = dict(copy.deepcopy(parts.configs[name]))
    if part.library == "diffusers":
        config = {"_class_name": part.class_name, "_diffusers_version": _DIFFUSERS_VERSION, **config}
    else:
        config = {"architectures": [part.class_name], "model_type": part.model_type, **config}
        # transformers 5 makes the model in the dtype that the config names, not in the tensors' own
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    _write_json(folder / "config.json", config)
    io.write_weights(folder, part.stem, _cast(to_torch(parts.params[name]), dtype, name), max_shard_bytes)


def _cast(state: Mapping[str, np.ndarray | Stored], dtype: str, where: str) -> dict[str, np.ndarray | Stored]:
    def checked(key: str, _: int, array: np.ndarray) -> np.ndarray:
        if not np.isfinite(array).all():
            raise UserError(
                f"{where}.{key}: NaN, infinite or too large for {dtype}; nothing was written, save in float32"
            )
        return array

    cast: dict[str, np.ndarray | Stored] = dict(state)
    for key, array in state.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            continue
        if isinstance(array, Stored):
            cast[key] = array.astype(dtype).map(partial(checked, key))
            continue
        with np.errstate(over="ignore"):
            cast[key] = checked(key, 0, array.astype(jnp.dtype(dtype), copy=False))
    return cast


def _index(parts: PipelineParts) -> dict[str, Any]:
    scheduler = parts.configs["scheduler"].get("_class_name", "DDIMScheduler")
    return {
        "_class_name": parts.layout.class_name,
        "_diffusers_version": _DIFFUSERS_VERSION,
        "scheduler": ["diffusers", scheduler],
        "tokenizer": ["transformers", parts.layout.tokenizers[0]],
        **{name: [part.library, part.class_name] for name, part in parts.layout.components.items()},
        **{name: [None, None] for name in parts.layout.optional if name not in parts.configs},
        **parts.configs.get("model_index", {}),
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
