"""Any scorer's folder: its tokenizer and texts read, and the folder written whole or not at all."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from tokenizers import Tokenizer

from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.checkpoints.keys import to_torch
from vpo_jax.checkpoints.untrusted import load_tokenizer
from vpo_jax.runtime.errors import UserError

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


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


def read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of tokenizer.json; padding and truncation are as the file says.

    Raises:
        UserError: it is missing or damaged, or has more tokens than the model.
    """
    where = folder / "tokenizer.json"
    io.read_json(where)
    tokenizer = load_tokenizer(lambda: Tokenizer.from_file(str(where)), folder)
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"{where}: {tokenizer.get_vocab_size()} tokens, but config.json has vocab_size {vocab_size}; "
            "use the tokenizer that belongs to this scorer"
        )
    return tokenizer


def read_plain_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """As `read_tokenizer`, without padding and truncation."""
    tokenizer = read_tokenizer(folder, vocab_size)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_text(file: str | Path) -> str:
    """The text of a file, as it stands there.

    Raises:
        UserError: it cannot be read as text.
    """
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as text ({error}); give a UTF-8 file") from error


def check_dtype(name: str) -> None:
    """Raises UserError for anything but "" and a name in `DTYPES`."""
    if name and name not in DTYPES:
        raise UserError(f"dtype: {name!r} is not one of {', '.join(DTYPES)}")


def dtype_to_load(name: str, stored: np.ndarray) -> Any:
    """The dtype of a name in `DTYPES`; of "" bfloat16 where `stored` has it, and else float32."""
    return DTYPES[name or ("bfloat16" if stored.dtype == jnp.bfloat16 else "float32")]
