"""Files that are written whole or not at all.

The new content goes into a hidden file beside the old one, which then takes its name. So a reader meets the old
content or the new, and a process that is killed leaves no half of a file.
"""

import json
import os
from pathlib import Path
from typing import Any


def write_bytes_atomically(path: str | Path, data: bytes) -> None:
    """Makes `data` the content of the file `path`.

    A link keeps pointing where it does, and what it points to is replaced. A device or a pipe is written to as it is.

    Raises:
      OSError: the system's own, when the file cannot be written; nothing is left beside it.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        path.write_bytes(data)  # a directory refuses
        return
    path = Path(os.path.realpath(path))
    whole = path.with_name(f".{path.name}.tmp")
    try:
        whole.write_bytes(data)
        os.replace(whole, path)
    except BaseException:
        whole.unlink(missing_ok=True)
        raise


def write_text_atomically(path: str | Path, text: str) -> None:
    """Makes `text` the content of the file `path`, in UTF-8; see `write_bytes_atomically`."""
    write_bytes_atomically(path, text.encode())


def write_json(path: str | Path, value: Any) -> None:
    """Makes `value`, as indented JSON with a last line break, the content of the file `path`.

    Raises:
      OSError: as `write_bytes_atomically`.
      TypeError: JSON has no such value; nothing is written.
    """
    write_text_atomically(path, json.dumps(value, indent=2) + "\n")
