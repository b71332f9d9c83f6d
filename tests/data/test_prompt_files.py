"""Files of prompts of every kind that people have: read by their own rules, or refused with the fix."""

import gzip
import json
import subprocess
from pathlib import Path

import pytest

from vpo_jax.data.prompt_files import ENDINGS, match_videos, read_prompt_file
from vpo_jax.data.prompts import load_prompts, longer_than
from vpo_jax.runtime.errors import UserError

TEXTS = ["a cat, on a mat", 'a "big" dog', "a bird"]
FILES = ["000000.mp4", "000001.mp4", "000002.mp4"]
PAIRS = dict(zip(FILES, TEXTS, strict=True))
RECORDS = [{"file_name": name, "caption": text} for name, text in PAIRS.items()]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path):
    return read_prompt_file(path, "data.prompts")


@pytest.mark.parametrize(
    "value",
    [
        TEXTS,
        {"prompts": TEXTS},
        {"version": 1, "Prompts": TEXTS},
        [{"prompt": text} for text in TEXTS],
        [{"Caption": text, "fps": 8} for text in TEXTS],
        [{"prompt_en": text, "dimension": ["motion"]} for text in TEXTS],
        {"captions": [{"text": text} for text in TEXTS]},
        {"prompt": dict(enumerate(TEXTS))},
    ],
)
def test_a_json_file_holds_a_list_of_texts_or_of_objects(tmp_path, value):
    file = read(write(tmp_path, "p.json", json.dumps(value, indent=4)))
    assert list(file.prompts) == TEXTS


@pytest.mark.parametrize(
    "value",
    [
        PAIRS,
        {"prompts": [{name: text} for name, text in PAIRS.items()]},
        {name: {"prompt": text, "seed": 1} for name, text in PAIRS.items()},
        RECORDS,
    ],
)
def test_a_json_file_may_name_the_video_of_each_prompt(tmp_path, value):
    file = read(write(tmp_path, "p.JSON", json.dumps(value)))
    assert (list(file.prompts), list(file.names)) == (TEXTS, FILES)


def test_an_object_with_a_prompt_is_one_prompt_and_its_other_texts_are_none(tmp_path):
    file = read(write(tmp_path, "p.json", '{"prompt": "a cat", "negative_prompt": "ugly"}'))
    assert list(file.prompts) == ["a cat"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.JSONL"])
def test_a_jsonl_file_in_any_case_keeps_the_names_of_videos(tmp_path, name):
    lines = "\r\n".join(json.dumps(record) for record in RECORDS)
    file = read(write(tmp_path, name, "\ufeff" + lines + "\r\n"))
    assert (list(file.prompts), list(file.names)) == (TEXTS, FILES)


@pytest.mark.parametrize("header", ["file_name,text", "Path,Caption", "VIDEO,Prompt"])
def test_a_csv_file_has_a_column_of_prompts_in_any_case(tmp_path, header):
    rows = '000000.mp4,"a cat, on a mat"\r\n000001.mp4,"a ""big"" dog"\r\n\r\n000002.mp4,a bird\r\n'
    file = read(write(tmp_path, "p.csv", f"\ufeff{header}\r\n{rows}"))
    assert (list(file.prompts), list(file.names)) == (TEXTS, FILES)


def test_a_tsv_file_is_cut_at_tabs_and_a_cell_may_hold_a_line_feed(tmp_path):
    file = read(write(tmp_path, "p.tsv", 'id\tprompt\n1\ta cat, on a mat\n2\t"two\nlines"\n'))
    assert list(file.prompts) == ["a cat, on a mat", "two\nlines"] and file.names is None


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1501243\n"


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_git_lfs_pointer_is_named_with_the_line_that_fetches_it(tmp_path, ending):
    with pytest.raises(UserError, match=rf"git-lfs pointer.* git -C {tmp_path} lfs pull"):
        read(write(tmp_path, f"train{ending}", LFS))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "<!DOCTYPE html>\n<html></html>", "is a web page"),
        ("p.csv", gzip.compress(b"prompt\na\n", mtime=0), "is gzip; unpack it with: gunzip --keep"),
        ("p.txt", b"PAR1\x15\x04", "is a Parquet table; save it as .csv or .jsonl"),
        ("p.csv", b"PK\x03\x04xl/workbook.xml", "an office file; unpack it, or save the table as .csv"),
        ("p.txt", "a cat\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("p.txt", b"a\0b", "is binary"),
        ("p.md", "a cat\n", "ends in '.md'"),
        ("p.parquet", b"PAR1", "Parquet"),
        ("prompts", "a cat\n", "ends in 'nothing'"),
        ("p.txt", '["a", "b"]', r"holds JSON.*name it \.json"),
        ("p.txt", '{\n "a": "b"\n}', "holds JSON"),
        ("p.txt", '{"prompt": "a"}\n{"prompt": "b"}\n', r"name it \.json or \.jsonl"),
        ("p.txt", "video,prompt\n0.mp4,a cat\n", r"columns video, prompt; name it \.csv"),
        ("p.txt", b"a cat\ra dog\r", "line 1 has a carriage return inside"),
        ("p.csv", "", "columns"),
        ("p.json", "[]", "holds no prompt"),
        ("p.csv", "prompt\n", "holds no prompt"),
        ("p.json", "3", "holds a int"),
        ("p.json", '{"info": {}, "images": [1]}', "has no text under"),
        ("p.json", '["a", {"b": 1}]', "entry 2 has no text"),
        ("p.json", '["a", null]', "entry 2 has no text"),
        ("p.json", '{"0.mp4": "a", "0.mp4": "b"}', "has '0.mp4' twice"),
        ("p.json", '{"a cat": "0.mp4", "a dog": "1.mp4"}', "turn it round"),
        ("p.json", "[" * 100_000 + "]" * 100_000, "nested too deep"),
        ("p.json", '["\\ud800"]', "half of a character"),
        ("p.json", '[{"video": "a.mp4", "prompt": "a"}, {"prompt": "b"}]', "entry 2 names no video"),
        ("p.csv", "videoid,name\n1,a cat\n", r"has the columns \['videoid', 'name'\] and none of prompt"),
        ("p.csv", "id;prompt\n1;a cat\n", "separate them by commas"),
        ("p.csv", "prompt,prompt\na,b\n", "has 'prompt' twice"),
        ("p.csv", "prompt\na cat, on a mat\n", "line 2 has 2 cells for 1 columns; put texts in double quotes"),
        ("p.csv", "id,prompt\n1,\n", "line 2 has no text under 'prompt'"),
        ("p.csv", 'prompt\n"a cat\n', "line 2: .*put texts in double quotes"),
        ("p.csv", b"prompt\ncaf\xe9\n", "not UTF-8"),
    ],
)
def test_what_is_no_file_of_prompts_is_refused_with_its_name_and_a_fix(tmp_path, name, content, says):
    with pytest.raises(UserError, match=says) as error:
        read(write(tmp_path, name, content))
    assert str(error.value).startswith("data.prompts: ") and name in str(error.value)


def test_the_proposed_gunzip_works(tmp_path):
    path = write(tmp_path, "p.txt.gz", gzip.compress(b"a cat\n", mtime=0))
    with pytest.raises(UserError) as error:
        read(path)
    subprocess.run(str(error.value).partition("with: ")[2].split(), check=True)
    assert list(read(tmp_path / "p.txt").prompts) == ["a cat"]


def test_a_path_that_begins_with_a_tilde_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "p.txt", "a cat\n")
    assert list(load_prompts("~/p.txt")) == ["a cat"]


def named(tmp_path, content: str):
    return read_prompt_file(write(tmp_path, "p.json", content), "--prompts")


def test_videos_are_matched_by_name_and_never_by_position(tmp_path):
    file = named(tmp_path, json.dumps(dict(reversed(PAIRS.items()))))
    videos = [Path("elsewhere", name) for name in FILES]
    assert match_videos(file, videos, "--prompts") == TEXTS
    assert match_videos(file, videos[:1], "--prompts") == TEXTS[:1]


@pytest.mark.parametrize("names", [["a/0.mp4", "b/0.mp4"], ["/x/a/0.mp4", "/x/b/0.mp4"], ["a/0", "b/0"]])
def test_the_longest_common_end_of_a_path_decides(tmp_path, names):
    file = named(tmp_path, json.dumps(dict(zip(names, ["one", "two"], strict=True))))
    assert match_videos(file, [Path("clips/b/0.mp4"), Path("clips/a/0.mp4")], "--prompts") == ["two", "one"]


def test_an_id_names_the_video_without_its_ending_also_where_it_has_a_dot(tmp_path):
    file = named(tmp_path, '{"v1.5": "one", "v1": "two"}')
    assert match_videos(file, [Path("v1.mp4"), Path("v1.5.webp")], "--prompts") == ["two", "one"]


def test_a_video_without_a_prompt_and_a_name_with_two_are_refused(tmp_path):
    file = named(tmp_path, json.dumps(PAIRS))
    with pytest.raises(UserError, match=r"--prompts: 1 of 2 videos have no prompt by their name \(9\.mp4\)"):
        match_videos(file, [Path("000000.mp4"), Path("9.mp4")], "--prompts")
    file = named(tmp_path, '{"a/0.mp4": "one", "b/0.mp4": "two"}')
    with pytest.raises(UserError, match=r"has 2 different prompts by that name; name its folder too"):
        match_videos(file, [Path("0.mp4")], "--prompts")


def test_prompts_longer_than_the_text_encoder_reads_are_counted():
    prompts = ["a " * n for n in range(20)]
    assert longer_than(prompts, lambda texts: [len(text.split()) for text in texts], 10) == (9, 20)
    number, looked_at = longer_than(["a"] * 30_000, lambda texts: [1] * len(texts), 1)
    assert (number, looked_at) == (0, 10_000)
