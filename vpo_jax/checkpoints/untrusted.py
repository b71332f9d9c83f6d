"""Folders that somebody else made: what may be opened in them, which of the hub's is meant, and bounds of numbers."""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vpo_jax.checkpoints.safetensors_io import read_json
from vpo_jax.models.config_fields import LAYERS
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.paths import stays_inside, user_path

_READ = (".json", ".txt", ".model", ".jinja", ".safetensors")
_MOST_ENTRIES = 10_000
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
)  # fmt: skip
_LEAST_TENSORS = 8  # of a layer of any kind that is known here
_LARGEST_GUIDANCE = 1000
_DEFAULTS = {"num_frames": 2**14, "height": 2**14, "width": 2**14, "num_inference_steps": 2**14}


def open_folder(path: str | Path, field: str = "path") -> Path:
    """The folder of a model, a scorer or an adapter, after a look at where its links lead.

    Of a folder of the hub's cache (models--OWNER--NAME) it is the snapshot of `main`, or the only one. A path that is
    no folder is returned as it is.

    Raises:
        UserError: naming the link: it leads out of the folder, other than to the blobs of the hub's cache, or nowhere;
            or a folder of the hub's cache without a snapshot.
    """
    folder = _snapshot(user_path(path, field))
    if not folder.is_dir():
        return folder
    try:
        entries = list(itertools.islice(folder.iterdir(), _MOST_ENTRIES))
        below = [list(itertools.islice(entry.iterdir(), _MOST_ENTRIES)) for entry in entries if entry.is_dir()]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    for entry in itertools.chain(entries, *below):
        is_read = entry.suffix in _READ or entry.is_dir()
        if not is_read or (entry.is_dir() and not entry.is_symlink()) or stays_inside(entry, folder):
            continue
        if not entry.exists():
            fix = "copy the model with what its links point to (cp -rL), or download it again"
            raise UserError(f"{entry}: a dangling link to {entry.readlink()}; {fix}")
        if not entry.is_dir() or any(file.suffix in _READ for file in entry.iterdir()):
            raise UserError(
                f"{entry}: leads out of the folder, to {entry.resolve()}; copy the folder with what its links point to:"
                f" cp -rL {folder} NEW_FOLDER"
            )
    return folder


def _snapshot(folder: Path) -> Path:
    snapshots = folder / "snapshots"
    if not folder.name.startswith(("models--", "datasets--")) and not (folder / "refs").is_dir():
        return folder
    if not (folder / "blobs").is_dir() and not snapshots.is_dir():
        return folder
    found = sorted(entry for entry in snapshots.iterdir() if entry.is_dir()) if snapshots.is_dir() else []
    main = folder / "refs" / "main"
    if main.is_file():
        named = [entry for entry in found if entry.name == main.read_text(encoding="utf-8", errors="replace").strip()]
        found = named or found
    if len(found) != 1:
        what = f"{len(found)} snapshots; give one of them" if found else "no snapshot; download the model again"
        raise UserError(f"{folder}: a folder of the hub's cache with {what}")
    return found[0]


def load_tokenizer(load: Callable[[], Any], folder: Path, kind: str = "tokenizer") -> Any:
    """What `load` reads from a tokenizer's folder, whose JSON files are looked at first.

    Raises:
        UserError: a file that is too large, too deep, no JSON or names one elsewhere, or anything that `load` raises:
            the library has no error of its own, and a panic of its compiled part is no Exception.
    """
    for file in sorted(folder.glob("*.json")):
        if file.name in _TOKENIZER_FILES:
            others = read_json(file).get("fast_tokenizer_files", [])
            if not isinstance(others, list) or not all(isinstance(name, str) and "/" not in name for name in others):
                raise UserError(f"{file}: fast_tokenizer_files names a file elsewhere; remove it")
    try:
        return load()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: not a {kind} ({reason:.300}); copy it again") from error


def check_layers(config: Mapping[str, Any], tensors: int, where: str) -> None:
    """Raises UserError where a parsed config.json has more layers than a file of so many tensors can hold.

    A model is laid out before its weights are compared with it, and that takes time for each layer.
    """
    blocks = config.get("block_out_channels")
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_layers(value, tensors, where)
        elif key in LAYERS and isinstance(value, int):
            # A block's layers stand twice: on the way down and on the way up.
            layers = value * (2 * len(blocks) if isinstance(blocks, list) else 1)
            if layers * _LEAST_TENSORS > tensors:
                raise UserError(
                    f"{where}: {key} is {value}, and the weights have {tensors} tensors, too few for that; use"
                    " the config.json that belongs to these weights"
                )


def read_defaults(file: Path) -> dict[str, Any]:
    """Of vpo_jax.json: the sizes and settings that a model was made for; {} where there is no such file.

    Raises:
        UserError: a value that no video or sampling could have, by name.
    """
    if not file.is_file():
        return {}
    defaults = read_json(file)
    for name, largest in _DEFAULTS.items():
        value = defaults.get(name)
        whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest
        if value is not None and not whole:
            raise UserError(f"{file}: {name} must be a whole number from 1 to {largest}, found {value!r:.60}")
    scale = defaults.get("guidance_scale")
    number = isinstance(scale, int | float) and not isinstance(scale, bool) and 0 <= scale <= _LARGEST_GUIDANCE
    if scale is not None and not number:
        raise UserError(f"{file}: guidance_scale must be a number from 0 to {_LARGEST_GUIDANCE}, found {scale!r:.60}")
    return defaults
