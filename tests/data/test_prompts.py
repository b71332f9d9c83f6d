"""Prompt lists: what is read, and what each bad file is told."""

import pytest

from vpo_jax.data.prompts import fingerprint, load_prompts, set_apart
from vpo_jax.runtime.errors import UserError


def write(tmp_path, text, name="prompts.txt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_text_file_holds_one_prompt_a_line(tmp_path):
    path = write(tmp_path, '\ufeffa "red" ball\r\n\n  <b>bold</b> & 🎈 \na\u2028b\n')
    assert load_prompts(path) == ['a "red" ball', "<b>bold</b> & 🎈", "a\u2028b"]


def test_a_jsonl_file_holds_objects_with_a_prompt_that_may_be_empty(tmp_path):
    path = write(tmp_path, '{"prompt": "a", "id": 1}\n\n{"prompt": ""}\n', "prompts.jsonl")
    assert load_prompts(path) == ["a", ""]


def test_a_prompt_of_500_words_is_one_prompt(tmp_path):
    assert load_prompts(write(tmp_path, "word " * 500)) == [("word " * 500).strip()]


def test_the_worlds_captions_have_names():
    train, tune, held_out = (set(load_prompts(f"shapes:{split}")) for split in ("train", "tune", "held_out"))
    assert train and tune and held_out
    assert not train & held_out and not tune & held_out


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        ("", "empty.txt", "holds no prompt"),
        ("\n \n", "blank.txt", "holds no prompt"),
        (b"caf\xe9\n", "latin.txt", "not UTF-8"),
        ("{'prompt': 1}\n", "a.jsonl", "line 1 is not JSON"),
        ('{"prompt": "a"}\n{"text": "b"}\n', "b.jsonl", "line 2 has no text under"),
        ('"a"\n', "c.jsonl", 'no text under "prompt"'),
    ],
)
def test_a_bad_file_is_named_with_the_fix(tmp_path, content, name, says):
    with pytest.raises(UserError, match=says) as error:
        load_prompts(write(tmp_path, content, name))
    assert str(error.value).startswith("data.prompts: ") and name in str(error.value)


def test_a_missing_file_a_folder_and_an_unknown_split_are_named(tmp_path):
    for source, says in ((str(tmp_path / "no.txt"), "no file"), (str(tmp_path), "cannot be read")):
        with pytest.raises(UserError, match=says):
            load_prompts(source)
    with pytest.raises(UserError, match=r"data\.held_out: the shapes world has no split 'test'; choose one of train"):
        load_prompts("shapes:test", "data.held_out")


def test_the_fingerprint_tells_lists_apart():
    assert fingerprint(["a", "b"]) == fingerprint(("a", "b")) != fingerprint(["b", "a"]) != fingerprint(["a\nb"])


def test_a_tenth_of_the_prompts_is_set_apart_and_never_trained_on():
    prompts = [f"clip {i % 25}" for i in range(50)]
    training, held_out = set_apart(prompts)
    assert held_out == ["clip 9", "clip 19"]
    assert set(training) == set(prompts) - set(held_out) and len(training) == 46
    assert set_apart(["a", "b", "a"]) == (["a", "a"], ["b"])


def test_one_prompt_cannot_be_set_apart():
    with pytest.raises(UserError, match=r"data\.held_out"):
        set_apart(["a", "a"])
