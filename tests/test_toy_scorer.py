"""A scorer that implements the protocol and nothing else works everywhere as MODULE:ATTRIBUTE."""

import json

import numpy as np
import pytest

from tests.running import lines
from tests.toy_scorer import toy
from vpo_jax import evaluate, main, score
from vpo_jax.data.prompts import load_prompts

SOURCE = "tests.toy_scorer:toy"


@pytest.fixture(autouse=True)
def traced():
    toy.traced.clear()
    return toy.traced


@pytest.mark.slow
def test_a_toy_scorer_trains_and_reads_each_prompt_once(job, tmp_path, traced):
    flags = [*job, f"--config.reward.scorers={SOURCE}", "--config.train.steps=1", "--config.eval.every=0"]
    flags += ["--config.train.prompts_per_step=2", "--config.rollout.candidates=3", "--config.eval.prompts=1"]
    main.main([*flags, f"--workdir={tmp_path / 'run'}"])
    (line,) = lines(tmp_path / "run")
    assert 0 < line["reward/toy/brightness"] < 1
    assert (6, 2) in traced


def test_a_toy_scorer_scores_files(tmp_path):
    videos = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 8, 3), np.uint8)
    for i, video in enumerate(videos):
        np.save(tmp_path / f"{i}.npy", video)
    (tmp_path / "prompts.txt").write_text("one\ntwo words\n")
    output = tmp_path / "scores.json"
    flags = [f"--videos={tmp_path}/*.npy", f"--prompts={tmp_path / 'prompts.txt'}", f"--output={output}"]
    score.main([f"--scorer={SOURCE}", *flags])
    rows = json.loads(output.read_text())
    assert [row["words"] for row in rows] == [1, 2]
    expected = videos[:, [0, 3]].mean((1, 2, 3, 4)) / 255
    np.testing.assert_allclose([row["brightness"] for row in rows], expected, rtol=1e-5)


@pytest.mark.slow
def test_a_toy_scorer_compares_models(model_folder, strange_prompts, tmp_path):
    flags = [f"--base={model_folder}", f"--tuned={model_folder}", f"--prompts={strange_prompts}", "--limit=2"]
    flags += [f"--scorers={SOURCE}", "--num_inference_steps=2", f"--output={tmp_path}"]
    evaluate.main(flags)
    scores = json.loads((tmp_path / "evaluation.json").read_text())["base_scores"]
    words = [[len(prompt.split())] for prompt in load_prompts(str(strange_prompts))[:2]]
    assert scores["toy/words"] == words and np.array(scores["toy/brightness"]).shape == (2, 1)
