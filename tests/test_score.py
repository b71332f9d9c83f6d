"""The command `python -m vpo_jax.score`, with the analytic judge as the scorer."""

import csv
import json
import re

import jax
import numpy as np
import pytest

from vpo_jax import score
from vpo_jax.rewards.loading import load_scorer
from vpo_jax.runtime import cli
from vpo_jax.runtime.video import write_webp
from vpo_jax.shapes import world


@pytest.fixture(scope="module")
def rendered():
    indices = world.caption_indices("held_out")[:3]
    frames = world.render_videos(jax.random.key(0), indices, 0.0).frames
    captions = [world.make_caption(world.ALL_ATTRIBUTES[index]) for index in indices]
    return np.asarray(world.to_uint8(frames)), captions


@pytest.fixture
def folder(rendered, tmp_path):
    videos, captions = rendered
    for i, video in enumerate(videos):
        np.save(tmp_path / f"{i}.npy", video)
    (tmp_path / "prompts.txt").write_text("\n".join(captions), encoding="utf-8")
    return tmp_path


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.run(score.main, argv)
    return int(caught.value.code)


def test_scores_of_files_are_those_of_the_arrays(rendered, folder):
    arguments = ("--scorer=judge", f"--videos={folder}/*.npy", f"--prompts={folder}/prompts.txt")
    assert run(*arguments, f"--output={folder}/scores.json") == 0
    rows = json.loads((folder / "scores.json").read_text())
    expected = load_scorer("judge")(*rendered)
    assert [row["video"] for row in rows] == [f"{folder}/{i}.npy" for i in range(3)]
    for name, values in expected.items():
        np.testing.assert_allclose([row[name] for row in rows], values, rtol=1e-6)


def test_enlarged_videos_score_as_they_were_with_every_pixel(rendered, folder):
    write_webp(folder / "large" / "0.webp", rendered[0][0])
    (folder / "one.txt").write_text(rendered[1][0])
    arguments = ("--scorer=judge", f"--videos={folder}/large/*", f"--prompts={folder}/one.txt")
    assert run(*arguments, f"--output={folder}/scores.csv", "--every_pixel=4") == 0
    (row,) = csv.DictReader((folder / "scores.csv").open())
    assert float(row["overall"]) == pytest.approx(load_scorer("judge")(rendered[0][:1], rendered[1][:1])["overall"][0])


def test_jsonl_has_a_line_a_video(folder):
    arguments = ("--scorer=judge", f"--videos={folder}/*.npy", f"--prompts={folder}/prompts.txt")
    assert run(*arguments, f"--output={folder}/scores.jsonl") == 0
    assert len([json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]) == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--scorer=judge", "--videos=DIR/*.mp4", "--output=DIR/s.json"], "--videos: no file"),
        (["--scorer=judge", "--videos=DIR/*", "--output=DIR/s.json"], "give one to each|not a video|no caption"),
        (["--scorer=judge", "--videos=DIR/prompts.txt", "--output=DIR/s.json"], "not a video file"),
        (["--scorer=judge", "--videos=DIR/0.npy", "--output=DIR/s.json"], "no caption|none"),
        (
            ["--scorer=judge", "--videos=DIR/0.npy", "--prompts=DIR/prompts.txt", "--output=DIR/s.json"],
            "3 prompts for 1",
        ),
        (["--scorer=nobody", "--videos=DIR/0.npy", "--output=DIR/s.json"], "nobody"),
        (["--scorer=judge", "--videos=DIR/0.npy", "--output=DIR/s.txt"], "--output: .*must end in"),
        (["--scorer=judge", "--videos=DIR/0.npy", "--output=DIR/none/s.json"], "--output: .*cannot be written"),
    ],
)
def test_wrong_input_is_one_line_exit_code_2_and_nothing_written(folder, capsys, argv, message):
    before = sorted(path.name for path in folder.iterdir())
    assert run(*(word.replace("DIR", str(folder)) for word in argv)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_for_scores.py").write_text(
        "def same(videos, prompts): return {'same': [1.5] * len(videos)}\n"
        "def broken(videos, prompts): return {'x': videos[100]}\n"
        "broken.dimensions, broken.ranges = ('x',), ((0, 1),)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_videos_of_any_kind_are_scored_without_prompts_and_equal_scores_are_scores(mine):
    rng = np.random.default_rng(0)
    np.save(mine / "a.npy", rng.uniform(size=(5, 40, 32, 3)).astype(np.float32))  # floats in [0, 1]
    np.save(mine / "b.npy", rng.integers(0, 256, (1, 32, 64, 3), np.uint8))  # one frame
    np.save(mine / "c.npy", rng.integers(0, 256, (5, 40, 32, 3), np.uint8))  # another size than its neighbour
    assert run("--scorer=mine_for_scores:same", f"--videos={mine}/*.npy", f"--output={mine}/scores.json") == 0
    assert [row["same"] for row in json.loads((mine / "scores.json").read_text())] == [1.5] * 3


def test_the_classical_measures_read_what_the_judge_cannot(mine):
    video = np.random.default_rng(0).integers(0, 256, (1, 32, 45, 3), np.uint8)
    np.save(mine / "noise.npy", video)
    assert run("--scorer=classical", f"--videos={mine}/noise.npy", f"--output={mine}/scores.json") == 0
    (row,) = json.loads((mine / "scores.json").read_text())
    assert row["dynamic_degree"] == 0 and row["naturalness"] < -10


@pytest.mark.parametrize(
    ("video", "scorer", "message"),
    [
        (np.full((2, 32, 32, 3), 1.5, np.float32), "mine_for_scores:same", "save uint8, or floats between 0 and 1"),
        (np.zeros((2, 32, 32), np.uint8), "mine_for_scores:same", r"save an array \[frames, height, width, 3\]"),
        (np.zeros((0, 32, 32, 3), np.uint8), "mine_for_scores:same", "is not a video"),
        (np.zeros((2, 31, 32, 3), np.uint8), "classical", "need 32 on each side"),
        (
            np.zeros((2, 32, 32, 3), np.uint8),
            "mine_for_scores:broken",
            "raised IndexError in mine_for_scores.py, line 2",
        ),
        (np.zeros((2, 32, 32, 3), np.uint8), "mine_for_scores:none", "--scorer: mine_for_scores:none is missing"),
        (
            np.zeros((2, 32, 32, 3), np.uint8),
            "videoscore",
            "--scorer: videoscore has its folder in a run's config only",
        ),
    ],
)
def test_what_cannot_be_scored_is_one_line_and_nothing_is_written(mine, capsys, video, scorer, message):
    np.save(mine / "video.npy", video)
    assert run(f"--scorer={scorer}", f"--videos={mine}/video.npy", f"--output={mine}/scores.json") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error
    assert not (mine / "scores.json").exists()
