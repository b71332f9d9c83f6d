"""gs:// workdirs, beside a gcsfuse that only says what it was asked, and a made-up table of mounts."""

import os
import threading
from pathlib import Path

import pytest

from vpo_jax import convert
from vpo_jax.runtime import buckets
from vpo_jax.runtime.buckets import MOUNT_FLAGS, in_bucket, local_folder
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.workdir import completed_steps, open_workdir


@pytest.fixture
def mounts(tmp_path, monkeypatch):
    table = tmp_path / "mounts"
    table.write_text("/dev/vda / ext4 rw 0 0\n")
    monkeypatch.setattr(buckets, "_MOUNTS", table)
    return table


@pytest.fixture
def gcsfuse(tmp_path, monkeypatch, mounts):
    """Where the fake gcsfuse writes its arguments; it mounts by adding a line to the table."""
    home, said = tmp_path / "bin", tmp_path / "asked"
    home.mkdir()
    script = home / "gcsfuse"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> "{said}"\n'
        "while [ $# -gt 2 ]; do shift; done\n"
        '[ "$1" != forbidden ] || { echo "starting" >&2; echo "Error: 403 Forbidden" >&2; exit 1; }\n'
        f'sleep 0.1\necho "$1 $2 fuse.gcsfuse rw,nosuid 0 0" >> "{mounts}"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return said


def test_a_directory_is_itself(tmp_path):
    assert local_folder(tmp_path / "a:b") == tmp_path / "a:b" and local_folder("runs/x") == Path("runs/x")
    assert not in_bucket(tmp_path)


def test_a_bucket_that_is_mounted_is_found_there(mounts, tmp_path):
    target = tmp_path / "a mount"
    escaped = str(target).replace(" ", r"\040")
    with mounts.open("a") as file:
        file.write(f"other {tmp_path} fuse rw 0 0\nmine {escaped} fuse.gcsfuse rw 0 0\n")
    assert local_folder("gs://mine/runs/try/") == target / "runs/try"
    assert local_folder(Path("gs://mine/runs/try")) == target / "runs/try"  # pathlib writes one slash
    assert in_bucket(target / "runs") and in_bucket(tmp_path) and not in_bucket("/")
    with mounts.open("a") as file:
        file.write(f"/dev/vdb {escaped}/disk ext4 rw 0 0\n")
    assert not in_bucket(target / "disk" / "runs"), "the innermost mount counts"


def test_a_bucket_is_mounted_once_for_all_processes_of_a_host(gcsfuse, tmp_path, capsys):
    found = []
    threads = [threading.Thread(target=lambda: found.append(local_folder("gs://mine/run"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    target = tmp_path / "cache" / "vpo_jax" / "buckets" / "mine"
    assert found == [target / "run"] * 3 and in_bucket(found[0])
    assert gcsfuse.read_text() == f"{' '.join(MOUNT_FLAGS)} mine {target}\n"
    assert capsys.readouterr().err.count(f"gs://mine is mounted at {target}; fusermount -u {target} ends that") == 1


def test_a_run_lives_in_a_bucket(gcsfuse, tmp_path):
    address, config = "gs://mine/run", {"seed": 1}
    assert completed_steps(address, config) is None
    with open_workdir(address, config) as workdir:
        assert workdir.path == tmp_path / "cache/vpo_jax/buckets/mine/run" and not workdir.resumed
        workdir.complete(3)
    assert completed_steps(address, config) == 3
    with pytest.raises(UserError, match=r"--workdir: there is no .*mine/other/config\.json"):
        convert.convert("gs://mine/other", tmp_path / "out")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://mine", "--workdir: gs://mine names no folder of the bucket; give gs://mine/FOLDER"),
        ("gs://mine/a/../b", "names no folder of the bucket"),
        ("gs://-o/run", "is no directory; give one, or a folder of a bucket as gs://BUCKET/FOLDER"),
        ("s3://mine/run", "--workdir: s3://mine/run is no directory"),
        ("gs://forbidden/run", r"gcsfuse could not mount the bucket \(Error: 403 Forbidden\); may this account write"),
    ],
)
def test_what_is_no_folder_of_a_bucket_is_refused(gcsfuse, address, message):
    with pytest.raises(UserError, match=message):
        local_folder(address)


def test_without_gcsfuse_the_way_to_it_is_said(mounts, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"--workdir: gs://b1/run: gcsfuse, which mounts buckets, is not installed"):
        local_folder("gs://b1/run")
