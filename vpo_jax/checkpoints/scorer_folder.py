"""Writing any scorer's folder, whole or not at all."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.checkpoints.keys import to_torch
from vpo_jax.runtime.errors import UserError


def write_scorer_folder(folder: str | Path, files: Mapping[str, str], params: Any) -> None:
    """Writes the texts `files` and model.safetensors beside `folder` and renames it; replaces a scorer's folder.

    Raises:
        UserError: the name is taken by something else, or the disk refuses.
    """
    folder = Path(folder).resolve()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file()):
        raise UserError(f"{folder}: taken by something that is no scorer; choose another folder")
    partial = folder.parent / f".{folder.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")
        io.write_weights(partial, io.TRANSFORMERS_STEM, to_torch(params))
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(partial, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error}); free space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
