"""Where prompts lie: each source a sequence that holds places and reads a prompt when it is asked for."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from vpo_jax.runtime.errors import UserError

_BOM = b"\xef\xbb\xbf"
_LARGEST = 2**20  # bytes of a prompt's line


class Prompts(Sequence[str]):
    """Prompts at some places of a source; a slice is another such view.

    Attributes:
      read: place -> prompt.
      places: int64 [number of prompts], whatever `read` takes.
    """

    def __init__(self, read: Callable[[int], str], places: np.ndarray) -> None:
        self.read, self.places = read, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> "Prompts": ...

    def __getitem__(self, index: int | slice) -> "str | Prompts":
        if isinstance(index, slice):
            return Prompts(self.read, self.places[index])
        return self.read(int(self.places[index]))


def read_file(path: Path, field: str) -> Prompts:
    """A text file, one prompt a line, or .jsonl with objects that have a "prompt"; every line is looked at once.

    In memory stay 8 bytes a prompt. Blank lines are skipped; only .jsonl can hold the empty prompt.

    Raises:
      UserError: no such file, a pipe, not UTF-8, nothing in it, or a line that is not an object with a "prompt"; and,
        when a prompt is read later, a file that has become shorter.
    """
    is_json = path.suffix == ".jsonl"
    places, place = [], 0
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{field}: there is no file {str(path)!r}; give one prompt a line, or shapes:train") from None
    except OSError as error:
        raise UserError(
            f"{field}: {str(path)!r} cannot be read: {error.strerror}; give a text or .jsonl file"
        ) from None
    if not file.seekable():
        file.close()
        raise UserError(f"{field}: {str(path)!r} is a pipe, and prompts are read more than once; write them to a file")
    try:
        # By line feeds alone, not splitlines(): it would also cut at rare separators that may stand inside a prompt.
        for number, line in enumerate(file, start=1):
            try:
                text = _text(line, place)
            except UnicodeDecodeError as error:
                where = place + error.start
                raise UserError(f"{field}: {str(path)!r} is not UTF-8 (byte {where}); save it as UTF-8") from None
            if text:
                places.append(place)
                if is_json:
                    _prompt_of(text, f"{field}: {str(path)!r} line {number}")
            place += len(line)
    except OSError as error:
        raise UserError(
            f"{field}: {str(path)!r} cannot be read: {error.strerror}; give a text or .jsonl file"
        ) from None
    if not places:
        raise UserError(f"{field}: {str(path)!r} holds no prompt; write one a line")
    return Prompts(_LineReader(file, path, field, is_json), np.array(places, np.int64))


class _LineReader:
    """The prompt that begins at a byte of an open file."""

    def __init__(self, file: Any, path: Path, field: str, is_json: bool) -> None:
        self._file, self._path, self._field, self._is_json = file, path, field, is_json

    def __call__(self, place: int) -> str:
        line, size = b"", 4096
        while b"\n" not in line and size <= _LARGEST:
            line = os.pread(self._file.fileno(), size, place)
            if len(line) < size:
                break
            size *= 4
        where = f"{self._field}: {str(self._path)!r}"
        try:
            text = _text(line.partition(b"\n")[0], place)
        except UnicodeDecodeError:
            text = ""
        if not text:
            raise UserError(f"{where} has changed since the run began; put the old file back, and it continues")
        return _prompt_of(text, f"{where} byte {place}") if self._is_json else text


def _text(line: bytes, place: int) -> str:
    return (line.removeprefix(_BOM) if place == 0 else line).decode("utf-8").strip()


def _prompt_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f'{where} is not JSON ({error.msg}); write {{"prompt": "..."}}') from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f'{where} has no text under "prompt"; write {{"prompt": "..."}}')
    return record["prompt"]


def read_tfds(source: str, field: str) -> Prompts:
    """A TFDS data set's folder, or FOLDER:SPLIT (train if left out), stored as array_record: no TensorFlow is needed.

    Its feature "prompt" is read, or else its only text.

    Raises:
      UserError: no such data set or split, another file format, or no text to take.
    """
    import tensorflow_datasets as tfds  # it takes a second to import and is seldom wanted

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

    return Prompts(read, np.arange(len(rows)))


def read_hub(source: str, field: str) -> Prompts:
    """OWNER/NAME/FILE: a text or .jsonl file of a data set on the hub, downloaded once.

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
    return read_file(Path(path), field)
