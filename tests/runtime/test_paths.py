import os
from pathlib import Path

import pytest

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.paths import (
    check_output_file,
    check_output_folder,
    expand_user,
    find_files,
    natural_order,
    user_path,
)


def test_a_tilde_is_the_home_folder_and_a_dollar_is_a_letter(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x", "--workdir") == tmp_path / "x"
    assert expand_user("~/x", "--base") == str(tmp_path / "x")
    assert user_path("$HOME/~/x", "--workdir") == Path("$HOME/~/x")
    assert expand_user("owner/name", "--base") == "owner/name"


@pytest.mark.parametrize(
    ("path", "says"),
    [("", "is no path"), ("a\0b", "is no path"), ("~nobody-at-all/x", "home folder"), ("x" * 300, "cannot be reached")],
)
def test_what_no_file_can_be_named_is_a_user_error(path, says):
    with pytest.raises(UserError, match=f"--output: .*{says}"):
        user_path(path, "--output")


def test_a_link_to_itself_is_a_user_error(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="cannot be reached"):
        user_path(tmp_path / "loop", "--base")


def test_numbers_in_names_are_sorted_as_numbers():
    names = ["10.mp4", "2.mp4", "a/10/1.mp4", "a/9/2.mp4", "b.mp4", "02.mp4", "1a.mp4"]
    expected = ["1a.mp4", "02.mp4", "2.mp4", "10.mp4", "a/9/2.mp4", "a/10/1.mp4", "b.mp4"]
    assert sorted(names, key=natural_order) == expected


def test_files_are_found_in_natural_order_under_a_folder_with_brackets(tmp_path):
    folder = tmp_path / "a[1]"
    folder.mkdir()
    for name in ("10.mp4", "2.mp4", "clip[3].mp4", "clip3.mp4"):
        (folder / name).touch()
    assert [p.name for p in find_files(f"{folder}/*.mp4", "--videos")] == [
        "2.mp4", "10.mp4", "clip3.mp4", "clip[3].mp4",
    ]  # fmt: skip
    assert find_files(f"{folder}/clip[3].mp4", "--videos") == [folder / "clip[3].mp4"]
    assert [p.name for p in find_files(f"{folder}/[0-9]*.mp4", "--videos")] == ["2.mp4", "10.mp4"]
    assert len(find_files(f"{tmp_path}/**/*.mp4", "--videos")) == 4


def test_a_folder_in_place_of_a_pattern_is_told_the_pattern(tmp_path):
    (tmp_path / "0.mp4").touch()
    with pytest.raises(UserError, match="give a pattern") as error:
        find_files(str(tmp_path), "--videos")
    assert find_files(str(error.value).split("'")[1], "--videos") == [tmp_path / "0.mp4"]
    with pytest.raises(UserError, match="--videos: no file is named"):
        find_files(f"{tmp_path}/*.gif", "--videos")


def test_an_output_is_checked_and_nothing_is_made(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to("nowhere")
    assert check_output_folder(tmp_path / "new" / "deep", "--output") == tmp_path / "new" / "deep"
    assert check_output_file(tmp_path / "new.JSON", "--output", (".json",)) == tmp_path / "new.JSON"
    for name, says in (("file", "is a file"), ("file/below", "is a file"), ("gone", "is a dangling link")):
        with pytest.raises(UserError, match=f"--output: .*{says}"):
            check_output_folder(tmp_path / name, "--output")
    with pytest.raises(UserError, match=r"needs 1000000000\.0 GB"):
        check_output_folder(tmp_path / "new", "--output", needed_bytes=10**18)
    for name in ("none/a.json", "."):
        with pytest.raises(UserError, match=r"--output: .*cannot be written"):
            check_output_file(tmp_path / name, "--output")
    with pytest.raises(UserError, match=r"must end in one of \.json"):
        check_output_file(tmp_path / "a.txt", "--output", (".json",))
    assert sorted(os.listdir(tmp_path)) == ["file", "gone"]


def test_what_a_folder_must_not_hold_is_asked_before_anything_is_made(tmp_path):
    def refuse(folder: Path) -> None:
        raise UserError(f"{folder}: holds something else")

    with pytest.raises(UserError, match="holds something else"):
        check_output_folder(tmp_path, "--output", refuse)
