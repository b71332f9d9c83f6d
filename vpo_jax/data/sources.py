"""Prompts of a TFDS data set or of a file of a data set on the hub."""

from pathlib import Path
from typing import Any

import numpy as np

from vpo_jax.data.prompt_files import PromptFile, read_prompt_file
from vpo_jax.data.views import Prompts
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.paths import expand_user


def read_tfds(source: str, field: str) -> PromptFile:
    """A TFDS data set's folder, or FOLDER:SPLIT (train if left out), stored as array_record: no TensorFlow is needed.

    Its feature "prompt" is read, or else its only text.

    Raises:
      UserError: no such data set or split, another file format, or no text to take.
    """
    import tensorflow_datasets as tfds  # it takes a second to import and is seldom wanted

    source = expand_user(source, field)
    folder, _, split = source.rpartition(":")
    if not folder or Path(source).is_dir():
        folder, split = source, "train"
    if not Path(folder, "dataset_info.json").is_file():
        raise UserError(f"{field}: {folder!r} has no dataset_info.json; give the folder of a TFDS data set's version")
    try:
        builder = tfds.builder_from_directory(folder)
        if split not in builder.info.splits:
            raise UserError(
                f"{field}: {folder!r} has no split {split!r}; choose one of {', '.join(builder.info.splits)}"
            )
        rows: Any = builder.as_data_source(split=split)
    except (NotImplementedError, ValueError, OSError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{field}: {folder!r} cannot be read without TensorFlow ({reason}); prepare it with"
            ' file_format="array_record"'
        ) from error
    texts = [name for name, feature in builder.info.features.items() if isinstance(feature, tfds.features.Text)]
    if "prompt" in texts:
        texts = ["prompt"]
    if len(texts) != 1:
        raise UserError(f"{field}: {folder!r} has the texts {texts or 'none'} and no 'prompt'; name one of them prompt")
    if not len(rows):
        raise UserError(f"{field}: {source!r} holds no prompt; give another split")

    def read(place: int) -> str:
        value = rows[place][texts[0]]
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)

    return PromptFile(Prompts(read, np.arange(len(rows))))


def read_hub(source: str, field: str) -> PromptFile:
    """OWNER/NAME/FILE: a file of prompts of a data set on the hub, downloaded once.

    Raises:
      UserError: not such a name, or neither there nor in the cache.
    """
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    if not (owner and name and file):
        raise UserError(f"{field}: hub:{source} is no file of a data set; write hub:OWNER/NAME/FILE.jsonl")
    from huggingface_hub import hf_hub_download  # it takes a second to import and is seldom wanted

    try:
        path = hf_hub_download(f"{owner}/{name}", file, repo_type="dataset")
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{field}: the hub gave no {file} of {owner}/{name} ({reason}); check the name, or download it and give"
            " its path"
        ) from error
    return read_prompt_file(path, field)
