"""The directory of one run: its config, its lock, and whether it is complete."""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from vpo_jax.runtime.buckets import local_folder
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.files import write_json
from vpo_jax.runtime.processes import agree, is_main

# Fields that may differ on resume; train.steps may also grow. They set what is written, or how and where a run is
# computed, and never change its results.
_FREE = re.compile(r"\.every$|^log\.|^profile\.|^eval\.on_alarm$|^checkpoint\.keep$|^reward\.(timeout|offload)$")
# Fields that may also differ, but change the order of sums: the numbers that may then differ in their last digits.
_ROUNDING = (
    (re.compile(r"^mesh\."), "videos, scores and losses"),
    (re.compile(r"^rollout\.microbatch$"), "videos, their scores and losses"),
    (re.compile(r"^(train\.(microbatch|remat)|lora\.merge)$"), "losses and gradients"),
    (re.compile(r"^reward\.\w+\.attention$"), "scores"),
    (re.compile(r"^data\.text_cache$"), "encodings of prompts"),
)
_CONTENTS = "contents.json"
_OURS = ("metrics.jsonl", "checkpoints", "samples", "export", "report.html", "environment.json")
_FOLDERS = ("checkpoints", "samples", "export", "failure")
_FILES = ("config.json", "contents.json", "environment.json", "metrics.jsonl", "report.html", "complete")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_OPTIMIZATION_LEVEL", "JAX_DEFAULT_MATMUL_PRECISION")
_PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_collections", "numpy", "safetensors", "transformers",
    "diffusers", "imageio", "tensorboardX",
)  # fmt: skip


class Workdir:
    """A run's directory, held by the run's main process until `close` or the process's end."""

    def __init__(self, path: Path, config: dict[str, Any], resumed: bool, lock: int | None, note: str = "") -> None:
        self.path = path
        self.config = config
        self.resumed = resumed  # a run of this config was here before
        self.note = note  # which settings changed on resume, and which numbers they may round differently; or ""
        self._lock = lock

    @property
    def checkpoints(self) -> Path:
        """Orbax checkpoints."""
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        """Sampled videos."""
        return self.path / "samples"

    @property
    def export(self) -> Path:
        """The tuned model as a diffusers folder."""
        return self.path / "export"

    @property
    def report(self) -> Path:
        """The report of the run."""
        return self.path / "report.html"

    @property
    def failure(self) -> Path:
        """State and inputs of a step that was not finite."""
        return self.path / "failure"

    @property
    def completed_steps(self) -> int | None:
        """Steps of the run that completed here; None while it is not complete."""
        return _completed(self.path)

    def complete(self, steps: int) -> None:
        """Marks the run of `steps` steps as complete."""
        write_json(self.path / "complete", {"steps": steps})

    def close(self) -> None:
        """Releases the lock on the directory."""
        if self._lock is not None:
            os.close(self._lock)

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def completed_steps(
    path: str | Path, config: Mapping[str, Any], contents: Mapping[str, str] | None = None
) -> int | None:
    """Steps of the run that completed in `path`, None where none did; reads only.

    Raises UserError for what `open_workdir` would refuse, so that the refusal comes before a model is loaded.
    """
    path = local_folder(path)
    with writing(path):
        _refuse_files(path)
        _refuse_foreign(path)
        there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if not os.access(there, os.W_OK):
            raise UserError(f"--workdir: no permission to write {there}; choose another one")
        before = _read_config(path / "config.json")
        if before is None:
            return None
        _refuse_differences(path, before, json.loads(json.dumps(config)), contents or {})
    return _completed(path)


def open_workdir(path: str | Path, config: Mapping[str, Any], contents: Mapping[str, str] | None = None) -> Workdir:
    """The run's directory, made where it is missing, locked, with config.json and environment.json in it.

    Of several processes the main one does all that, and the others wait for it; all have to see the same directory.
    A resumed run may differ in what says how and where it is computed, or what is written (mesh.*, log.*, *.every,
    microbatches, remat, offload, attention, text_cache, checkpoint.keep), and in a higher train.steps. A path may be
    another one where it holds the same.

    Args:
      path: of the directory.
      config: the resolved config as nested dicts.
      contents: of `fingerprint.contents_of`: what the config's paths hold. They are kept in contents.json.

    Raises:
      UserError: before anything is written, when the path is no directory, may not be written, is held by another
        run, or belongs to another config or to models and prompts with another content.
    """
    path = local_folder(path)
    resolved: dict[str, Any] = json.loads(json.dumps(config))
    opened, failure = Workdir(path, resolved, False, None), None
    if is_main():
        try:
            opened = _open(path, resolved, contents or {})
        except UserError as error:
            failure = error
    if agree(failure is not None):
        raise failure or UserError("--workdir: the main process refused it; its message says why")
    if agree(not (path / "config.json").is_file()):
        opened.close()
        raise UserError(f"--workdir: {path} is not the same directory for all processes; choose one that they share")
    opened.resumed = bool(agree(opened.resumed))
    return opened


def _open(path: Path, resolved: dict[str, Any], contents: Mapping[str, str]) -> Workdir:
    with writing(path):
        _refuse_files(path)
        _refuse_foreign(path)
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    try:
        with writing(path):
            before = _read_config(path / "config.json")
            rounded = [] if before is None else _refuse_differences(path, before, resolved, contents)
            if before is None or contents:
                write_json(path / _CONTENTS, {**(_read_config(path / _CONTENTS) or {}), **contents})
            if before != resolved:
                write_json(path / "config.json", resolved)
            now = environment()
            if before is not None:
                rounded += _other_devices(path / "environment.json", now)
            write_json(path / "environment.json", now)
    except BaseException:
        os.close(lock)
        raise
    note = f"resumed, and from here on some numbers may round differently: {', '.join(rounded)}" if rounded else ""
    return Workdir(path, resolved, before is not None, lock, note)


def _refuse_files(path: Path) -> None:
    """Raises UserError for a file in the place of the run's directory, or of a folder or file that the run writes."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir: {path} is a file; give a directory")
    for name in (*_FOLDERS, *_FILES):
        entry = path / name
        if not os.path.lexists(entry):
            continue
        if not (entry.is_dir() if name in _FOLDERS else entry.is_file()):
            kind = "folder" if name in _FOLDERS else "file"
            raise UserError(f"--workdir: {entry} is no {kind}, and the run writes one there; move it away")
        if not os.access(entry, os.W_OK):
            raise UserError(f"--workdir: no permission to write {entry}; choose another one")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals to write under `path` into UserErrors."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"--workdir: no permission to write {error.filename or path}; choose another one") from error
    except (NotADirectoryError, FileExistsError) as error:
        raise UserError(f"--workdir: a part of {path} is a file; give a directory") from error
    except OSError as error:
        if error.errno == errno.EROFS:
            raise UserError(f"--workdir: {path} is on a read-only disk; choose another one") from error
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"--workdir: the disk of {path} is full; free some space, and the same command continues"
            ) from error
        raise UserError(f"--workdir: {path} cannot be written ({error.strerror}); choose another one") from error


def environment() -> dict[str, Any]:
    """Versions, commit, devices and compiler's flags of this process."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "commit": _commit(),
        "backend": jax.default_backend(),
        "devices": [f"{device.device_kind} {device.id}" for device in devices],
        "processes": jax.process_count(),
        "flags": {name: os.environ[name] for name in _FLAGS if name in os.environ},
        "command": sys.argv,
    }


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _completed(path: Path) -> int | None:
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return int(json.loads((path / "complete").read_text())["steps"])
    return None


def _refuse_foreign(path: Path) -> None:
    if (path / "config.json").exists():
        return
    foreign = [name for name in _OURS if (path / name).exists()]
    if foreign:
        raise UserError(
            f"--workdir: {path} has a {foreign[0]} and no config.json, so it is not a run's directory;"
            f" choose another one, and nothing is written over"
        )


def _lock(path: Path) -> int:
    lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(lock, 32).decode(errors="replace").strip()
        os.close(lock)
        raise UserError(
            f"--workdir: {path} is in use by another run (process {holder or 'unknown'});"
            f" wait for it, stop it, or choose another one"
        ) from error
    os.truncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())
    return lock


def _read_config(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--workdir: {path} is not JSON; put it back or choose another directory") from error


def _refuse_differences(
    path: Path, before: Mapping[str, Any], now: Mapping[str, Any], contents: Mapping[str, str]
) -> list[str]:
    """Changes that may round numbers differently; raises UserError for a difference that makes another run."""
    old, new = _flat(before), _flat(now)
    held = _read_config(path / _CONTENTS) or {}
    differences, other, rounded = [], [], []
    for key in sorted(old.keys() | new.keys()):
        was, is_now = old.get(key), new.get(key)
        if held.get(key) is not None and contents.get(key) is not None:
            if held[key] != contents[key]:
                other.append(f"{key}: {is_now} holds something else than {was} did when the run began")
            continue
        if was == is_now or _FREE.search(key):
            continue
        numbers = next((numbers for pattern, numbers in _ROUNDING if pattern.search(key)), None)
        if numbers is not None:
            rounded.append(f"{key} was {was!r} and is {is_now!r} ({numbers})")
            continue
        if key == "train.steps" and isinstance(was, int) and isinstance(is_now, int) and is_now > was:
            continue
        differences.append(f"{key} was {was!r} and is {is_now!r}")
    if differences:
        raise UserError(
            f"--workdir: {path} belongs to another config: {', '.join(differences)};"
            f" choose another directory, or the old values to continue"
        )
    if other:
        raise UserError(f"--workdir: {path}: {', '.join(other)}; put that back, or choose another directory")
    return rounded


def _other_devices(file: Path, now: Mapping[str, Any]) -> list[str]:
    """What is to be said where a run goes on with more or fewer devices than it had: a CPU may have one a core."""
    was = 0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # nothing depends on what the file says
        was = len(json.loads(file.read_text())["devices"])
    number = len(now["devices"])
    return [f"there were {was} devices and are {number} (videos, scores and losses)"] if was not in (0, number) else []


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
