"""Weights of one model folder: safetensors in one file or in shards with an index. Pickles are never opened."""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.file_kinds import HEAD, known_stand_in
from vpo_jax.runtime.stored import Stored

# What the two libraries call the file of a model's weights.
DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")

_WRAPPERS = ("_orig_mod.", "module.")
_LARGEST_HEADER = 16 << 20  # bytes; 100,000 tensors have less

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def read_weights(folder: Path, stem: str) -> dict[str, np.ndarray]:
    """Every tensor of `folder`, by name, mapped from disk rather than read.

    Looks for `stem.safetensors`, then its sharded form, then the same two as fp32, bf16 and fp16 variants.

    Raises:
        UserError: no safetensors there (a pickle is named with the line that converts it), a shard that the
            index names is absent, or a file is cut short.
    """
    tensors: dict[str, np.ndarray] = {}
    for file in _weight_files(folder, stem):
        tensors.update(read_file(file))
    # torch.compile and DistributedDataParallel wrap a model, and its state dict then says so in every name.
    while tensors and (prefix := next((p for p in _WRAPPERS if all(key.startswith(p) for key in tensors)), "")):
        tensors = {key.removeprefix(prefix): array for key, array in tensors.items()}
    return tensors


def watch_weights(folder: Path, stem: str) -> Callable[[], None]:
    """A function that raises UserError once a file of `read_weights` was written to; arrays over it are not its own.

    A file that was removed or replaced is none: the arrays are over the one that was there.
    """
    seen = {file: file.stat() for file in _weight_files(folder, stem)}

    def check() -> None:
        for file, before in seen.items():
            with contextlib.suppress(FileNotFoundError):
                now = file.stat()
                same = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
                if same and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                    raise UserError(
                        f"{file}: was written to after it had been opened, and its weights are needed again; put the"
                        " model's own file back and start again"
                    )

    return check


def read_file(file: Path) -> dict[str, np.ndarray]:
    """The tensors of one safetensors file, as read-only arrays over the mapped file.

    The library's own numpy reader refuses bfloat16 and its flax reader makes arrays on the default device.

    Raises:
        UserError: the file is cut short or is not safetensors.
    """
    header, start = _read_header(file)
    header.pop("__metadata__", None)
    data = np.memmap(file, np.uint8, "r", start) if file.stat().st_size > start else np.zeros(0, np.uint8)
    return {name: _view(data, spec, f"{file}: {name}") for name, spec in header.items()}


def read_metadata(file: Path) -> dict[str, Any]:
    """The texts that a safetensors file carries beside its tensors; raises as `read_file`."""
    metadata = _read_header(file)[0].get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The parsed header, and where the tensors begin."""
    try:
        with file.open("rb") as stream:
            head = stream.read(HEAD)
            if kind := known_stand_in(file, head):
                raise UserError(f"{file}: is {kind}")
            header_bytes = int.from_bytes(head[:8], "little")
            if header_bytes > min(_LARGEST_HEADER, file.stat().st_size):
                raise UserError(f"{file}: damaged or cut short (a header of {header_bytes} bytes); copy it again")
            # It checks the header against the file's length, so that the offsets can be trusted.
            with safe_open(file, framework="numpy"):
                pass
            stream.seek(8)
            return json.loads(stream.read(header_bytes)), 8 + header_bytes
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged or cut short ({error}); copy or download it again") from error


def write_weights(
    folder: Path, stem: str, state: Mapping[str, np.ndarray | Stored], max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write a flat state dict into `folder`, in shards with an index where it is larger than `max_shard_bytes`.

    Of what is on disk one shard at a time is in memory.

    Raises:
        OSError: the disk refuses.
    """
    shards: list[dict[str, np.ndarray | Stored]] = [{}]
    filled = 0
    for name, array in state.items():
        if shards[-1] and filled + array.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = array
        filled += array.nbytes
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", _in_memory(shards[0]))
        return
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = folder / f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(file, _in_memory(shard))
        weight_map.update(dict.fromkeys(shard, file.name))
    total = sum(array.nbytes for array in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from `file`.

    Raises:
        UserError: the file is absent, unreadable, not JSON, or not an object.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(_largest_json(file) + 1)
        if kind := known_stand_in(file, text[:HEAD]):
            raise UserError(f"{file}: is {kind}")
        if len(text) > _largest_json(file):
            raise UserError(f"{file}: is larger than {_largest_json(file) >> 20} MB, as no such file is; copy it again")
        value = json.loads(text.decode("utf-8"))
    except FileNotFoundError as error:
        gone = "a dangling link" if file.is_symlink() else "no such file"
        raise UserError(f"{file}: {gone}; the folder is not complete, copy it again") from error
    except RecursionError as error:
        raise UserError(f"{file}: nested too deep; copy or download it again") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}); copy or download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: holds a {type(value).__name__} where a JSON object belongs; copy it again")
    return value


def _largest_json(file: Path) -> int:
    """Bytes: a parsed file takes some twenty times as many."""
    return 40 << 20 if file.name == "tokenizer.json" else 16 << 20 if file.name.endswith(".index.json") else 4 << 20


def refuse_pickle(file: Path) -> UserError:
    """The error that a pickled checkpoint gets, with the line that converts it."""
    source = file.parent if file.stem.startswith((DIFFUSERS_STEM, "pytorch_model")) else file
    return UserError(
        f"{file}: a pickle, which can run code when it is opened; "
        f"convert it with: python tools/pickle_to_safetensors.py {source}"
    )


def _weight_files(folder: Path, stem: str) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; the model is not complete, copy it again")
    for variant in ("", ".fp32", ".bf16", ".fp16"):
        single = folder / f"{stem}{variant}.safetensors"
        if single.is_file():
            return [single]
        # Releases of the two libraries put the variant into the index's name in three places.
        for name in (
            f"{stem}{variant}.safetensors.index.json",
            f"{stem}.safetensors{variant}.index.json",
            f"{stem}.safetensors.index{variant}.json",
        ):
            if (folder / name).is_file():
                return _shards(folder / name)
    for file in sorted(folder.iterdir()):
        if file.suffix in PICKLES:
            raise refuse_pickle(file)
    plain = folder / f"{stem}.safetensors"
    if plain.is_symlink():
        raise UserError(f"{plain}: a dangling link; copy the model with what its links point to: cp -rL")
    for file in sorted(folder.glob(f"{stem}.*.safetensors")):
        raise UserError(f"{folder}: has the variant {file.name} only; to load it: mv {file} {plain}")
    raise UserError(f"{folder}: no weights; {stem}.safetensors belongs there")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index}: has no weight_map from tensors to files; copy or download it again")
    for name in weight_map.values():
        if not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
            raise UserError(
                f"{index}: names the shard {name!r:.100}, which is no file of its folder; download it again"
            )
    files = [index.parent / name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{index}: names {', '.join(missing)}, which is not there; copy or download every shard")
    return files


def _view(data: np.ndarray, spec: Mapping[str, Any], where: str) -> np.ndarray:
    if spec["dtype"] not in _DTYPES:
        raise UserError(f"{where}: dtype {spec['dtype']} is not supported; save it in float16, bfloat16 or float32")
    begin, end = spec["data_offsets"]
    try:
        return np.asarray(data[begin:end]).view(_DTYPES[spec["dtype"]]).reshape(spec["shape"])
    except (ValueError, OverflowError, TypeError) as error:
        raise UserError(f"{where}: no shape of an array ({error}); copy or download the file again") from error


def _in_memory(shard: Mapping[str, np.ndarray | Stored]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in shard.items()}


def write_file(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes one safetensors file with texts beside its tensors: the same bytes for the same arguments.

    Raises:
        OSError: the disk refuses.
    """
    # transformers and diffusers refuse a file that does not say whose layout it has
    try:
        save_file(dict(tensors), file, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        # its own class, also for a full disk
        raise OSError(str(error)) from error
    if metadata:
        _sort_metadata(file)


def _sort_metadata(file: Path) -> None:
    """Puts the texts in the order of their names: the library's order changes from call to call."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        stream.seek(8)
        stream.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))
