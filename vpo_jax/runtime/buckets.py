"""Cloud Storage buckets as workdirs, mounted by gcsfuse.

Without a hierarchical namespace a bucket has no folders to rename: gcsfuse refuses, or copies and deletes one object
after the other. So no atomic write may rely on renaming a folder.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.paths import user_path

# Folders may be renamed, and no process caches metadata, because several processes share a workdir.
MOUNT_FLAGS = (
    "--implicit-dirs",
    "--rename-dir-limit=200000",
    "--metadata-cache-ttl-secs=0",
    "--metadata-cache-negative-ttl-secs=0",
)
_ADDRESS = re.compile(r"gs:/+([a-z0-9][-a-z0-9_.]{1,221})(?:/+(.*))?")
_PATIENCE = 120  # seconds
_MOUNTS = Path("/proc/self/mounts")


def local_folder(path: str | Path, flag: str = "--workdir") -> Path:
    """The folder that a path names, with `~` expanded; gs://BUCKET/FOLDER where the bucket is mounted, or mounted now.

    Raises UserError, naming `flag`: an address of something else, a bucket without a folder in it, or a gcsfuse that
    is missing or refuses.
    """
    text = str(path)
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        return user_path(path, flag)
    found = _ADDRESS.fullmatch(text)
    if not found:
        raise UserError(f"{flag}: {text} is no directory; give one, or a folder of a bucket as gs://BUCKET/FOLDER")
    bucket, folder = found[1], (found[2] or "").strip("/")
    if not folder or ".." in folder.split("/"):
        raise UserError(f"{flag}: {text} names no folder of the bucket; give gs://{bucket}/FOLDER")
    return _mount_point(bucket, text, flag) / folder


def in_bucket(path: str | Path) -> bool:
    """Whether a path lies on a mount in user space, as buckets of any cloud are."""
    whole = Path(path).resolve()
    holders = [(target, kind) for _, target, kind in _mounts() if whole.is_relative_to(target)]
    return bool(holders) and _is_fuse(max(holders, key=lambda holder: len(holder[0].parts))[1])


def _mounts() -> Iterator[tuple[str, Path, str]]:
    """(source, target, kind of file system) of what is mounted, in order."""
    if not _MOUNTS.exists():
        return
    for line in _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines():
        source, target, kind, *_ = line.split(" ")
        yield source, Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), target)), kind


def _is_fuse(kind: str) -> bool:
    return kind == "fuse" or kind.startswith("fuse.")  # a pod's buckets are plain "fuse"


def _mounted(bucket: str) -> Path | None:
    found = [target for source, target, kind in _mounts() if source == bucket and _is_fuse(kind)]
    return found[-1] if found else None


def _mount_point(bucket: str, text: str, flag: str) -> Path:
    if found := _mounted(bucket):
        return found
    gcsfuse = shutil.which("gcsfuse")
    if gcsfuse is None:
        raise UserError(
            f"{flag}: {text}: gcsfuse, which mounts buckets, is not installed; install it"
            f" (cloud.google.com/storage/docs/cloud-storage-fuse/install), or give a directory"
        )
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vpo_jax" / "buckets"
    target = cache / bucket
    target.mkdir(parents=True, exist_ok=True)
    with (cache / f".{bucket}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes of a host start at once
        if found := _mounted(bucket):
            return found
        try:
            done = subprocess.run(
                [gcsfuse, *MOUNT_FLAGS, bucket, str(target)],
                capture_output=True, text=True, timeout=_PATIENCE, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{flag}: {text}: gcsfuse did not mount the bucket within {_PATIENCE} s") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise UserError(f"{flag}: {text}: gcsfuse could not mount the bucket ({said}); may this account write it?")
    print(f"gs://{bucket} is mounted at {target}; fusermount -u {target} ends that", file=sys.stderr)
    return target
