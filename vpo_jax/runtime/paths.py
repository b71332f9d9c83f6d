"""Paths that a user gives: expanded, checked and sorted before any work."""

import errno
import glob
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vpo_jax.runtime.errors import UserError


def user_path(path: str | Path, field: str) -> Path:
    """The path with `~` and `~name` expanded; `$NAME` is the shell's and stays as it is.

    Raises:
      UserError: naming `field`: an empty path, a home that is not known, or a name that no file can have.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise UserError(f"{field}: {text!r} is no path; give a file or a folder")
    try:
        expanded = Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{field}: {text}: the home folder is not known; write the whole path") from error
    try:
        expanded.stat()
    except PermissionError as error:
        raise UserError(f"{field}: no permission to write {expanded}, or to read it; choose another one") from error
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise UserError(
                f"{field}: {os.fspath(expanded)[:200]} cannot be reached: {error.strerror}; give another path"
            ) from error
    return expanded


def expand_user(text: str, field: str) -> str:
    """`text` as `user_path` expands it where it begins with `~`; any other text is returned as it is."""
    return str(user_path(text, field)) if text.startswith("~") else text


def stays_inside(entry: Path, folder: Path) -> bool:
    """Whether a file of a folder is really in it, or in the blobs of the hub's cache that the folder belongs to."""
    try:
        real, root = entry.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return False
    if real.is_relative_to(root):
        return real.exists()
    repository = next((parent.parent for parent in (root, *root.parents) if parent.name == "snapshots"), None)
    return repository is not None and real.is_relative_to(repository / "blobs") and real.is_file()


def weights_bytes(folders: Iterable[str | Path]) -> int:
    """Bytes of the .safetensors files in these folders and in the folders in them; 0 for what is no folder."""
    patterns = ("*.safetensors", "*/*.safetensors")
    files = (file for folder in folders for pattern in patterns for file in Path(folder).glob(pattern))
    return sum(file.stat().st_size for file in files if file.is_file())


def natural_order(name: str | Path) -> tuple[tuple[tuple[int, int, str], ...], str]:
    """Sort key of a file name in which numbers count as numbers: 2.mp4 before 10.mp4."""
    parts = re.split(r"([0-9]+)", str(name))
    key = tuple((0, int(part), "") if number % 2 else (1, 0, part) for number, part in enumerate(parts) if part)
    return key, str(name)


def find_files(pattern: str, field: str) -> list[Path]:
    """The file that is named `pattern`, else the files that it matches, in natural order.

    Leading folders that exist are taken literally, so that a folder may be named `a[1]`.

    Raises:
      UserError: naming `field`: nothing is there.
    """
    path = user_path(pattern, field)
    if path.is_file():
        return [path]
    if path.is_dir():
        raise UserError(f"{field}: {path} is a folder; give a pattern of the files in it, as '{path}/*.mp4'")
    literal, rest = Path(), list(path.parts)
    while rest and (literal / rest[0]).exists():
        literal /= rest.pop(0)
    whole = os.path.join(glob.escape(str(literal)), *rest)
    found = sorted({Path(name) for name in glob.glob(whole, recursive=True)}, key=natural_order)
    files = [file for file in found if file.is_file()]
    if not files:
        raise UserError(f"{field}: no file is named {str(pattern)!r}; quote the pattern and mind where you are")
    return files


def check_output_file(name: str | Path, field: str, endings: Sequence[str] = ()) -> Path:
    """The path of a file that can be written; writes nothing.

    Raises:
      UserError: naming `field`: another ending than `endings`, a folder, or a folder that may not be written.
    """
    path = user_path(name, field)
    if endings and path.suffix.lower() not in endings:
        raise UserError(f"{field}: {name} must end in one of {', '.join(endings)}")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"{field}: {name} cannot be written; give a file in a folder that you may write into")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{field}: {name} may not be written over; give another file")
    return path


def check_output_folder(
    name: str | Path, field: str, refuse: Callable[[Path], None] | None = None, needed_bytes: int = 0
) -> Path:
    """The path of a folder that can be made or written into; makes and writes nothing.

    Args:
      name: the folder, which may be absent.
      field: what errors name.
      refuse: called with a folder that exists, to raise for what it must not hold.
      needed_bytes: what will be written, where that is known.

    Raises:
      UserError: a file is in the way, the folder may not be written, or its disk has less space than is needed.
    """
    path = user_path(name, field)
    # The nearest parent that exists is checked, because the folder would be made there.
    there = next(parent for parent in (path, *path.absolute().parents) if os.path.lexists(parent))
    if not there.is_dir():
        kind = "a dangling link" if there.is_symlink() else "a file"
        raise UserError(f"{field}: {there} is {kind} where a folder belongs; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{field}: no permission to write {there}; choose another folder")
    if needed_bytes and (free := shutil.disk_usage(there).free) < needed_bytes:
        raise UserError(
            f"{field}: {path} needs {needed_bytes / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free;"
            " free space or choose another disk"
        )
    if refuse is not None and path.is_dir():
        refuse(path)
    return path
