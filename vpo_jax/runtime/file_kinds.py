"""Files that are not what their names say: git-lfs pointers, web pages, archives. Each has a fix of its own."""

from pathlib import Path

_LFS = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html", b"<?xml")
_MAGIC = (
    (b"\x1f\x8b", "gzip", "unpack it with: gunzip --keep {path}"),
    (b"BZh", "bzip2", "unpack it with: bunzip2 --keep {path}"),
    (b"\xfd7zXZ\0", "xz", "unpack it with: unxz --keep {path}"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unpack it with: zstd -d {path}"),
    (b"PAR1", "a Parquet table", "save it as .csv or .jsonl"),
    (b"ARROW1", "an Arrow table", "save it as .csv or .jsonl"),
    (b"PK\x03\x04", "a zip archive or an office file", "unpack it, or save the table as .csv"),
    (b"%PDF", "a PDF", "save its text as .txt"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
)
HEAD = 512  # bytes of a file that are enough to recognise its kind


def known_stand_in(path: Path, head: bytes) -> str | None:
    """What a file holds instead of its content, and how to get the content, as text; None for any other file.

    Args:
      path: of the file, for the fix.
      head: its first `HEAD` bytes.
    """
    if head.startswith(_LFS):
        return f"a git-lfs pointer, and the content is not here; run: git -C {path.parent} lfs pull"
    if head.lstrip()[:64].lower().startswith(_PAGES):
        return "a web page; download the file itself (on the hub: resolve/ in place of blob/ in its address)"
    return None


def foreign_kind(path: Path, head: bytes) -> str | None:
    """As `known_stand_in`, and for a file that should be text also what kind of binary file it is."""
    found = known_stand_in(path, head)
    if found is not None:
        return found
    for magic, kind, fix in _MAGIC:
        if head.startswith(magic):
            return f"{kind}; {fix.format(path=path)}"
    return "binary; give a text file in UTF-8" if b"\0" in head else None
