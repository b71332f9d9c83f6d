"""Prompt lists: what is read, and what each bad file is told."""

import os
import sys
import tracemalloc

import numpy as np
import pytest

from vpo_jax.data.prompts import fingerprint, load_prompts, set_apart
from vpo_jax.runtime.errors import UserError


def write(tmp_path, text, name="prompts.txt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_a_text_file_holds_one_prompt_a_line(tmp_path):
    path = write(tmp_path, '\ufeffa "red" ball\r\n\n  <b>bold</b> & 🎈 \na\u2028b\n')
    assert list(load_prompts(path)) == ['a "red" ball', "<b>bold</b> & 🎈", "a\u2028b"]


def test_a_jsonl_file_holds_objects_with_a_prompt_that_may_be_empty(tmp_path):
    path = write(tmp_path, '{"prompt": "a", "id": 1}\n\n{"prompt": ""}\n', "prompts.jsonl")
    assert list(load_prompts(path)) == ["a", ""]


def test_a_prompt_of_500_words_is_one_prompt(tmp_path):
    assert list(load_prompts(write(tmp_path, "word " * 500))) == [("word " * 500).strip()]


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
    training, held_out = set_apart(["a", "b", "a"])
    assert (list(training), held_out) == (["a", "a"], ["b"])


def test_one_prompt_cannot_be_set_apart():
    with pytest.raises(UserError, match=r"data\.held_out"):
        set_apart(["a", "a"])


def test_a_long_list_is_read_from_disk_and_keeps_a_few_bytes_a_prompt(tmp_path):
    number = 50_000
    path = write(tmp_path, "".join(f"prompt {i} of a list that goes on, {'and on ' * 9}\n" for i in range(number)))
    tracemalloc.start()
    training, held_out = set_apart(load_prompts(path))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A place of 8 bytes for each, in the list and in the training part of it; the text itself is 99 bytes long.
    assert kept < 25 * number + sum(map(sys.getsizeof, held_out))
    assert len(held_out) == number // 10 and len(training) == number - len(held_out)
    assert training[0].startswith("prompt 0 of") and training[9].startswith("prompt 10 of")
    assert training[-1].startswith(f"prompt {number - 2} of") and [p[:9] for p in training[9:11]] == [
        "prompt 10",
        "prompt 11",
    ]


def test_a_file_that_became_shorter_is_named_and_not_read_past(tmp_path):
    path = write(tmp_path, "one\ntwo\nthree\n")
    prompts = load_prompts(path)
    assert prompts[2] == "three"
    write(tmp_path, "one\n")
    with pytest.raises(UserError, match=r"prompts\.txt' has changed since the run began"):
        prompts[2]


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """A TFDS data set stored as array_record; its order was shuffled when it was made."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class Clips(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "prompt": tfds.features.Text(),
                "other": tfds.features.Text(),
                "id": tfds.features.Scalar(np.int32),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, downloads):
            return {"train": self._generate_examples(7), "test": self._generate_examples(2)}

        def _generate_examples(self, number=0):
            for i in range(number):
                yield i, {"prompt": f'clip {i} "é"', "other": "x", "id": i}

    builder = Clips(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


def test_a_tfds_data_set_is_read_without_tensorflow(data_set):
    prompts = load_prompts(f"tfds:{data_set}")
    assert sorted(prompts) == [f'clip {i} "é"' for i in range(7)] and list(prompts) == list(
        load_prompts(f"tfds:{data_set}")
    )
    assert len(load_prompts(f"tfds:{data_set}:test")) == 2
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match="has no split 'dev'; choose one of"):
        load_prompts(f"tfds:{data_set}:dev")
    with pytest.raises(UserError, match=r"has no dataset_info\.json"):
        load_prompts("tfds:/nowhere")


def test_a_data_set_on_the_hub_is_named_with_the_way_around_while_offline():
    with pytest.raises(
        UserError, match=r"the hub gave no prompts\.jsonl of owner/name .* or download it and give its path"
    ):
        load_prompts("hub:owner/name/prompts.jsonl")
    with pytest.raises(UserError, match=r"write hub:OWNER/NAME/FILE\.jsonl"):
        load_prompts("hub:name")


def test_a_pipe_is_refused_since_prompts_are_read_again():
    reads, writes = os.pipe()
    try:
        os.write(writes, b"a red circle\n")
        os.close(writes)
        with pytest.raises(UserError, match=r"is a pipe, .* write them to a file"):
            load_prompts(f"/dev/fd/{reads}")
    finally:
        os.close(reads)
