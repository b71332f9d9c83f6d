"""Files of prompts: .txt, .json, .jsonl, .csv and .tsv, each read by its own rules and no other.

Nothing is guessed: another ending, another field or a row that does not fit is refused with what was found.
"""

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np

from vpo_jax.data.views import Prompts
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.file_kinds import HEAD, foreign_kind
from vpo_jax.runtime.paths import user_path
from vpo_jax.runtime.video import SUFFIXES

ENDINGS = (".txt", ".json", ".jsonl", ".csv", ".tsv")
# Fields that hold a prompt, the first that is there; and fields that name its video. In any case.
TEXTS = ("prompt", "prompt_en", "caption", "text")
NAMES = ("video", "video_path", "video_name", "file", "file_name", "filename", "path")
_LISTS = ("prompts", "captions", "data")  # keys under which a .json may hold its list
_BOM = b"\xef\xbb\xbf"
_LARGEST = 2**20  # bytes of a prompt's line
_FIX = f"give a file that ends in one of {', '.join(ENDINGS)}"


class PromptFile(NamedTuple):
    """Prompts in the order of their file, and the name of the video of each where the file gives names."""

    prompts: Sequence[str]
    names: Sequence[str] | None = None


def read_prompt_file(path: str | Path, field: str) -> PromptFile:
    """The prompts of one file, by its ending in any case; a byte order mark and CRLF are taken off.

    .txt holds one prompt a line, blank lines apart. .jsonl holds one object a line. .json holds a list of texts or of
    objects, a map from file name or id to either, or one of these under the key "prompts". .csv and .tsv have a
    header. Objects and headers have a field "prompt", "prompt_en", "caption" or "text"; a field as "video", "file" or
    "path" names the prompt's video. Text and .jsonl stay on disk: 8 bytes a prompt are in memory.

    Raises:
      UserError: naming `field`, the file and the fix: no such file, a pipe, another ending, something else than text
        in UTF-8 (a git-lfs pointer, a web page, a gzip, a Parquet table, ...), nothing in it, or a record without a
        prompt; and, when a prompt is read later, a file that has become shorter.
    """
    path = user_path(path, field)
    where = f"{field}: {str(path)!r}"
    try:
        with path.open("rb") as file:
            if not file.seekable():
                raise UserError(f"{where} is a pipe, and prompts are read more than once; write them to a file")
            head = file.read(HEAD)
        if kind := foreign_kind(path, head):
            raise UserError(f"{where} is {kind}")
        ending = path.suffix.lower()
        if ending not in ENDINGS:
            raise UserError(f"{where} ends in {ending or 'nothing'!r}, and prompts may not be told from that; {_FIX}")
        if ending == ".txt":
            _refuse_disguised(where, head)
        if ending in (".txt", ".jsonl"):
            found = _read_lines(path.open("rb"), where, ending == ".jsonl")
        else:
            text = _decoded(path.read_bytes(), where, 0)
            found = _read_json(text, where) if ending == ".json" else _read_table(text, where, ending == ".tsv")
    except FileNotFoundError:
        raise UserError(f"{field}: there is no file {str(path)!r}; {_FIX}, or shapes:train") from None
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}; {_FIX}") from None
    if not len(found.prompts):
        raise UserError(f"{where} holds no prompt; write one a line")
    return found


def match_videos(prompts: PromptFile, videos: Sequence[Path], field: str) -> list[str]:
    """The prompt of each video: by its name where the file gives names, and only else by position.

    A name may be a whole path, its last parts, or a file name without its ending; the longest common end decides.

    Raises:
      UserError: a video without a prompt, a name with two prompts, or another number of prompts than of videos.
    """
    if prompts.names is None:
        if len(prompts.prompts) != len(videos):
            raise UserError(
                f"{field}: {len(prompts.prompts)} prompts for {len(videos)} videos; give one to each, in their order"
            )
        return list(prompts.prompts)
    by_stem: dict[str, list[tuple[PurePosixPath, str]]] = {}
    for name, prompt in zip(prompts.names, prompts.prompts, strict=True):
        named = PurePosixPath(name.replace("\\", "/"))
        by_stem.setdefault(_stem(named), []).append((named, prompt))
    matched, absent = [], []
    for video in videos:
        candidates = by_stem.get(_stem(video), [])
        if not candidates:
            absent.append(video.name)
            continue
        scores = [_likeness(named, video) for named, _ in candidates]
        best = {text for (_, text), score in zip(candidates, scores, strict=True) if score == max(scores)}
        if len(best) > 1:
            raise UserError(f"{field}: {video} has {len(best)} different prompts by that name; name its folder too")
        matched.append(best.pop())
    if absent:
        shown = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
        raise UserError(
            f"{field}: {len(absent)} of {len(videos)} videos have no prompt by their name ({shown}); the first name in"
            f" the file is {prompts.names[0]!r}"
        )
    return matched


def _stem(path: PurePosixPath | Path) -> str:
    # Only a video's ending is one: the id "v1.5" ends in nothing.
    return path.stem if path.suffix.lower() in SUFFIXES else path.name


def _likeness(named: PurePosixPath, video: Path) -> tuple[bool, int]:
    """Whether the endings agree, and how many folders agree from the end on."""
    folders = zip(reversed(named.parts[:-1]), reversed(video.absolute().parts[:-1]), strict=False)
    common = 0
    for ours, theirs in folders:
        if ours != theirs:
            break
        common += 1
    return named.name == video.name, common


def _refuse_disguised(where: str, head: bytes) -> None:
    """A .txt that begins as JSON or as a table."""
    first = _without_bom(head).decode("utf-8", "replace").lstrip().partition("\n")[0].strip()
    with_records = first in ("[", "{")
    if not with_records and first[:1] in ("[", "{"):
        try:
            with_records = isinstance(json.loads(first), dict | list)
        except (ValueError, RecursionError):
            with_records = False
    if with_records:
        raise UserError(f"{where} holds JSON, and a .txt holds one prompt a line; name it .json or .jsonl")
    for mark, ending in ((",", ".csv"), ("\t", ".tsv")):
        cells = [cell.strip().strip('"').lower() for cell in first.split(mark)]
        if len(cells) > 1 and all(cell.isidentifier() for cell in cells) and set(cells) & set(TEXTS):
            raise UserError(f"{where} begins with the columns {', '.join(cells)}; name it {ending}")


def _read_lines(file: IO[bytes], where: str, is_json: bool) -> PromptFile:
    """Every line is looked at once; in memory stays where it begins."""
    places, names, place, field = [], [], 0, ""
    # By line feeds alone, not splitlines(): it would also cut at rare separators that may stand inside a prompt.
    for number, line in enumerate(file, start=1):
        text = _decoded(line, where, place)
        if "\r" in text and not is_json:
            raise UserError(f"{where} line {number} has a carriage return inside; save it with line feeds")
        if text:
            places.append(place)
            if is_json:
                record = _json(text, f"{where} line {number}")
                field = field or _text_field(record)
                _text_of(record, f"{where} line {number}", field)
                names.append(_name_of(record))
        place += len(line)
    reader = _LineReader(file, where, field if is_json else "")
    return PromptFile(Prompts(reader, np.array(places, np.int64)), _all_named(names, where))


class _LineReader:
    """The prompt that begins at a byte of an open file."""

    def __init__(self, file: IO[bytes], where: str, field: str) -> None:
        self._file, self._where, self._field = file, where, field  # "" where a line is a prompt

    def __call__(self, place: int) -> str:
        line, size = b"", 4096
        while b"\n" not in line and size <= _LARGEST:
            line = os.pread(self._file.fileno(), size, place)
            if len(line) < size:
                break
            size *= 4
        try:
            text = _decoded(line.partition(b"\n")[0], self._where, place)
        except UserError:
            text = ""
        if not text:
            raise UserError(f"{self._where} has changed since the run began; put the old file back, and it continues")
        where = f"{self._where} byte {place}"
        return _text_of(_json(text, where), where, self._field) if self._field else text


def _read_json(text: str, where: str) -> PromptFile:
    value = _json(text, where)
    if isinstance(value, dict):
        keys = {key.lower(): key for key in value}
        present = [keys[key] for key in (*_LISTS, *TEXTS) if key in keys]
        lists = [key for key in present if isinstance(value[key], list | dict)]
        if len(lists) == 1:
            value = value[lists[0]]
    if isinstance(value, dict) and isinstance(_value(value, TEXTS), str):
        value = [value]
    if isinstance(value, dict):
        items = [(f"{where}: {key!r}", key, item) for key, item in value.items()]
    elif isinstance(value, list):
        items = []
        for number, item in enumerate(value, start=1):
            at = f"{where}: entry {number}"
            # VideoDPO's {"000000.mp4": "a prompt"}.
            pair = isinstance(item, dict) and len(item) == 1 and _value(item, TEXTS) is None
            items += [(at, *next(iter(item.items())))] if pair else [(at, None, item)]
    else:
        raise UserError(f"{where} holds a {type(value).__name__}; write a list of texts, or a map from names to texts")
    field = next((_text_field(item) for _, _, item in items if isinstance(item, dict)), TEXTS[0])
    prompts = [_whole(item, at) if isinstance(item, str) else _text_of(item, at, field) for at, _, item in items]
    if isinstance(value, dict) and prompts and all(prompt.lower().endswith(SUFFIXES) for prompt in prompts):
        raise UserError(f"{where} maps texts to files; turn it round, from file names to prompts")
    names = [key if key is not None else _name_of(item) for _, key, item in items]
    return PromptFile(prompts, _all_named(names, where))


def _read_table(text: str, where: str, is_tsv: bool) -> PromptFile:
    lines = text.splitlines(keepends=True)
    rows = csv.reader(lines, delimiter="\t" if is_tsv else ",", strict=True)
    try:
        header = [cell.strip() for cell in next(rows, [])]
        chosen = next((i for name in TEXTS for i, cell in enumerate(header) if cell.lower() == name), None)
        if chosen is None:
            fix = "separate them by commas" if not is_tsv and len(header) == 1 else f"name one of them {TEXTS[0]}"
            raise UserError(f"{where} has the columns {header} and none of {', '.join(TEXTS)}; {fix}")
        _refuse_repeated([cell.lower() for cell in header], where)
        file = next((i for name in NAMES for i, cell in enumerate(header) if cell.lower() == name), None)
        prompts, names = [], []
        for row in rows:
            if not row:
                continue
            at = f"{where} line {rows.line_num}"
            if len(row) != len(header):
                raise UserError(f"{at} has {len(row)} cells for {len(header)} columns; put texts in double quotes")
            if not row[chosen].strip():
                raise UserError(f"{at} has no text under {header[chosen]!r}; fill it in, or write .jsonl")
            prompts.append(_whole(row[chosen].strip(), at))
            names.append(None if file is None else row[file].strip() or None)
    except csv.Error as error:
        raise UserError(f"{where} line {rows.line_num}: {error}; put texts in double quotes") from None
    return PromptFile(prompts, _all_named(names, where))


def _json(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _refuse_repeated([key for key, _ in pairs], where)
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise UserError(f'{where} is nested too deep; write {{"prompt": "..."}}') from None
    except ValueError as error:
        raise UserError(f'{where} is not JSON ({error}); write {{"prompt": "..."}}') from None


def _refuse_repeated(names: Sequence[str], where: str) -> None:
    if len(set(names)) != len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where} has {repeated!r} twice; give each another name")


def _value(record: Mapping[str, Any], wanted: Sequence[str]) -> Any:
    lower = {key.lower(): value for key, value in record.items()}
    return next((lower[name] for name in wanted if name in lower), None)


def _text_field(record: Any) -> str:
    """The field that holds the prompt, by the first record: all others must have it too."""
    fields = {key.lower() for key in record} if isinstance(record, dict) else set()
    return next((name for name in TEXTS if name in fields), TEXTS[0])


def _text_of(record: Any, where: str, field: str) -> str:
    text = _value(record, (field,)) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"the fields {', '.join(record) or 'none'}" if isinstance(record, dict) else type(record).__name__
        raise UserError(f'{where} has no text under "{field}" (found {found}); write {{"{field}": "..."}}')
    return _whole(text, where)


def _name_of(record: Any) -> str | None:
    name = _value(record, NAMES) if isinstance(record, dict) else None
    return name if isinstance(name, str) and name else None


def _all_named(names: Sequence[str | None], where: str) -> list[str] | None:
    found = [name for name in names if name is not None]
    if found and len(found) != len(names):
        place = names.index(None) + 1
        raise UserError(f"{where}: entry {place} names no video, and others do; name all of them or none")
    return found or None


def _whole(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where} has half of a character (a lone surrogate); write it again") from None
    return text


def _decoded(line: bytes, where: str, place: int) -> str:
    try:
        return (_without_bom(line) if place == 0 else line).decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {place + error.start}); save it as UTF-8") from None


def _without_bom(text: bytes) -> bytes:
    return text.removeprefix(_BOM)
