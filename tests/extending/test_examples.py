"""docs/extending.md's examples run, and the page shows them as they are."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.extending import toy_algorithm, toy_scorer
from tests.running import lines, without_time
from tests.training.conftest import make_config, run_training
from vpo_jax.algorithms.protocol import Entry
from vpo_jax.algorithms.table import ALGORITHMS
from vpo_jax.rewards.loading import load_scorer
from vpo_jax.rewards.protocol import Reward

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def test_every_excerpt_of_the_page_stands_in_the_file_that_it_names():
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    excerpts = re.findall(r"```python\n# (tests/extending/\w+\.py)\n(.*?)```", page, re.DOTALL)
    assert {name for name, _ in excerpts} == {f"tests/extending/{file.name}" for file in HERE.glob("toy_*.py")}
    for name, text in excerpts:
        source = (ROOT / name).read_text(encoding="utf-8")
        for part in re.split(r"^ *\.\.\.\n", text, flags=re.MULTILINE):
            assert part.strip("\n") in source, f"{name} does not have:\n{part}"


def test_a_scorer_by_module_and_attribute_scores_videos_on_its_own_frames():
    videos = np.zeros((2, 8, 32, 32, 3), np.uint8)
    videos[1, ..., 16:, :] = 255
    scores = load_scorer("tests.extending.toy_scorer:contrast")(videos, ["a", "b"])
    np.testing.assert_allclose(scores["contrast"], [0.0, 0.5], atol=1e-6)  # rounding of float32
    bright = load_scorer("tests.extending.toy_scorer:brightness")(videos, ["a", "b"])
    np.testing.assert_allclose(bright["brightness"], [0.0, 127.5])


def test_the_scorer_of_the_page_follows_the_protocol_and_trains(tmp_path):
    assert isinstance(toy_scorer.contrast, Reward)
    run_training(make_config(train__steps=1), tmp_path / "run", rewards=(toy_scorer.contrast,))
    (line,) = lines(tmp_path / "run")
    assert 0.0 < line["reward/contrast/contrast"] < 0.5 and line["loss/applied"] == 1.0


@pytest.fixture
def best_of_n(monkeypatch):
    """`run(folder, **config)` with the algorithm of the page: one more line in the table and nothing else."""
    monkeypatch.setitem(ALGORITHMS, "best_of_n", Entry(toy_algorithm.BestOfN))

    def run(folder, **changes):
        return run_training(make_config(algorithm__name="best_of_n", **changes), folder)

    return run


def test_the_algorithm_of_the_page_trains_and_a_continued_run_ends_as_an_uninterrupted_one(best_of_n, tmp_path):
    whole = best_of_n(tmp_path / "whole", train__steps=3)
    best_of_n(tmp_path / "parts", train__steps=1)
    parts = best_of_n(tmp_path / "parts", train__steps=3)
    written = lines(tmp_path / "whole")
    assert [line["loss/applied"] for line in written] == [1.0, 1.0, 1.0]
    assert [without_time(line) for line in lines(tmp_path / "parts")] == [without_time(line) for line in written]
    for one, other in zip(_leaves(whole.state.policy), _leaves(parts.state.policy), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_algorithm_of_the_page_lowers_the_error_on_what_it_chose(best_of_n, tmp_path):
    """Of one step's candidates: the mean over its first 5 updates against the mean over 60."""
    for updates in (5, 60):
        changes = {"train__steps": 1, "train__updates_per_step": updates, "optimizer__learning_rate": 1e-2}
        best_of_n(tmp_path / str(updates), **changes)
    (first,), (all_of_them,) = lines(tmp_path / "5"), lines(tmp_path / "60")
    assert all_of_them["loss/winner_error"] < 0.9 * first["loss/winner_error"]


def _leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
