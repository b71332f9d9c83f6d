"""Fingerprints of what paths hold: a resumed run recognises a model, a scorer or a file at another path by them."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.paths import expand_user, stays_inside, user_path

_READ = (".json", ".txt", ".model", ".safetensors", ".jsonl", ".csv", ".tsv")  # files of a folder that count
_WHOLE = 2**26  # bytes of a file that is read from end to end
_SAMPLE = 256  # bytes of each tensor
_PIECES = 256  # samples of a large file without tensors
_MOST_FILES = 2000
_LARGEST_HEADER = 16 << 20
# Fields of a run's config that name one path, and lists of scorers, in which any entry may be a folder.
_PATHS = ("model.path", "lora.path", "data.prompts", "data.held_out")
_LISTS = ("reward.scorers", "held_out.scorers")


def fingerprint(path: str | Path) -> str:
    """Of a file's content, or of the models, configs and tokenizers in a folder and its subfolders.

    A folder that was moved or copied keeps it. Large safetensors are not read: their header, their size
    and some bytes from the middle of every tensor count, because a training step or a merged adapter changes those.

    Raises:
      UserError: a file cannot be read.
    """
    path = Path(path)
    digest = hashlib.sha256()
    try:
        files = sorted(_files(path)) if path.is_dir() else [path]
        for file in files[:_MOST_FILES]:
            name = file.relative_to(path).as_posix() if path.is_dir() else ""
            digest.update(f"{name}\0{file.stat().st_size}\0".encode())
            for part in _parts(file):
                digest.update(part)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); check the path and its permissions") from error
    return digest.hexdigest()[:32]


def expand_paths(config: Any) -> None:
    """Expands `~` in place in every path that a run's config names.

    Raises:
      UserError: a path that no file can have, by its field.
    """
    for key in (*_PATHS, "data.text_cache"):
        section, _, name = key.partition(".")
        config[section][name] = expand_user(config[section][name], key)
    for section, value in config["reward"].items():
        if hasattr(value, "items"):
            for name in {"path", "query_prompt"} & set(value):
                value[name] = expand_user(value[name], f"reward.{section}.{name}")
    for key in _LISTS:
        section, _, name = key.partition(".")
        parts = [expand_user(part.strip(), key) for part in config[section][name].split(",")]
        config[section][name] = ",".join(parts)


def contents_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Fingerprints of what the paths of a run's config hold, by field; names and hub ids are not among them.

    Args:
      config: nested dicts.

    A field that lists scorers, of which some are folders, has an entry with their fingerprints in place of the paths.
    """
    found: dict[str, str] = {}
    for key in _PATHS:
        section, _, name = key.partition(".")
        _add(found, key, config.get(section, {}).get(name))
    for section, value in config.get("reward", {}).items():
        if isinstance(value, Mapping):
            for name in ("path", "query_prompt"):
                _add(found, f"reward.{section}.{name}", value.get(name))
    for key in _LISTS:
        section, _, name = key.partition(".")
        names = [part.strip() for part in str(config.get(section, {}).get(name, "")).split(",")]
        folders = {part for part in names if os.sep in part and user_path(part, key).is_dir()}
        if folders:
            found[key] = ",".join(fingerprint(user_path(part, key)) if part in folders else part for part in names)
    return found


def _add(found: dict[str, str], key: str, value: Any) -> None:
    if isinstance(value, str) and value:
        path = user_path(value, key)
        if path.is_dir() or path.is_file():
            found[key] = fingerprint(path)


def _files(folder: Path) -> Iterator[Path]:
    """Model files of the folder and of its subfolders, one level deep, hidden ones apart."""
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        below = entry.iterdir() if entry.is_dir() else [entry]
        wanted = (file for file in below if file.suffix.lower() in _READ and file.is_file())
        yield from (file for file in wanted if stays_inside(file, folder))


def _parts(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _WHOLE and file.suffix != ".safetensors":
            while part := stream.read(2**20):
                yield part
            return
        places = [0]
        header_bytes = int.from_bytes(stream.read(8), "little")
        if file.suffix == ".safetensors" and header_bytes <= min(size, _LARGEST_HEADER):
            header = stream.read(header_bytes)
            yield header
            places = [8 + header_bytes + place for place in _middles(header)] or places
        else:
            places = [piece * size // _PIECES for piece in range(_PIECES)]
        for place in places:
            yield os.pread(stream.fileno(), _SAMPLE, min(place, size))


def _middles(header: bytes) -> list[int]:
    """Where the middle of each tensor lies behind the header; none for a header that is broken."""
    try:
        spans = [spec["data_offsets"] for name, spec in json.loads(header).items() if name != "__metadata__"]
        return [max(0, (int(begin) + int(end) - _SAMPLE) // 2) for begin, end in spans]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return []
