import errno
import json
import os
import threading

import pytest

from vpo_jax.runtime import files


def test_a_new_file_holds_the_value_and_nothing_lies_beside_it(tmp_path):
    files.write_json(tmp_path / "a.json", {"ä": [1.5, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"ä": [1.5, None]}
    assert (tmp_path / "a.json").read_bytes().endswith(b"}\n")
    files.write_text_atomically(tmp_path / "b", "ü")
    assert (tmp_path / "b").read_bytes() == "ü".encode()
    assert sorted(os.listdir(tmp_path)) == ["a.json", "b"]


def test_an_interrupted_write_leaves_the_old_content_and_no_part_of_the_new(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, 1)

    def stopped(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, 2)
    assert path.read_text() == "1\n" and os.listdir(tmp_path) == ["a.json"]


def test_a_value_that_json_does_not_know_leaves_the_old_content(tmp_path):
    files.write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_text() == "1\n" and os.listdir(tmp_path) == ["a.json"]


def test_the_systems_refusal_comes_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        files.write_text_atomically(tmp_path / "missing" / "a", "")
    assert error.value.errno == errno.ENOENT
    with pytest.raises(IsADirectoryError):
        files.write_text_atomically(tmp_path, "")
    assert os.listdir(tmp_path) == []


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "there" / "real")
    files.write_text_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there" / "real").read_text() == "new"


def test_a_pipe_is_written_to_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    reader.start()
    files.write_text_atomically(tmp_path / "pipe", "hello")
    reader.join(timeout=30)
    assert found == ["hello"] and os.listdir(tmp_path) == ["pipe"]
