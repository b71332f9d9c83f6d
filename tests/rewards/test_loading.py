"""Scorers by name and folder, and the function that people call."""

import json

import jax
import numpy as np
import pytest

from vpo_jax.models.video_scorer import VideoScorer, VideoScorerConfig
from vpo_jax.rewards.loading import load_reward, load_rewards, load_scorer
from vpo_jax.rewards.protocol import DIMENSIONS, Reward, even_indices
from vpo_jax.rewards.shapes.folder import ScorerParts, make_word_tokenizer, read_scorer, write_scorer
from vpo_jax.runtime.errors import UserError
from vpo_jax.shapes import world

WORDS = sorted({word for caption in world.captions("tune") for word in caption.split()})


@pytest.fixture(scope="module")
def parts():
    tokenizer = make_word_tokenizer(WORDS, 16)
    config = VideoScorerConfig(
        DIMENSIONS, ((1.0, 4.0),) * 5, 8, 32, tokenizer.get_vocab_size(), 16, (8, 8), 4, 4, 16, 16
    )
    videos = np.zeros((1, 8, 32, 32, 3), np.uint8)
    init = jax.jit(VideoScorer(config).init)
    return ScorerParts(config, init(jax.random.key(0), videos, np.zeros((1, 16), np.int32))["params"], tokenizer)


@pytest.fixture
def folder(parts, tmp_path):
    write_scorer(tmp_path / "mine", parts, {"recipe.json": {"seed": 0}})
    return tmp_path / "mine"


def _videos(count, frames=8, size=32):
    return np.random.RandomState(0).randint(0, 256, (count, frames, size, size, 3), np.uint8)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(
        UserError, match=r"'videoscroe' is no scorer; known names are classical, judge, shapes, videoreward, videoscore"
    ):
        load_reward("videoscroe")


def test_a_scorer_of_the_config_without_its_folder_names_the_field_and_the_fix(folder):
    settings = {"timeout": 0.0, "videoscore": {"path": "", "query_prompt": ""}}
    with pytest.raises(UserError, match=r"reward\.videoscore\.path: is empty, but reward\.scorers names videoscore"):
        load_rewards("videoscore", training=True, settings=settings)
    with pytest.raises(
        UserError, match=r"but held_out\.scorers names videoscore.*--config\.reward\.videoscore\.path=DIR"
    ):
        load_rewards("videoscore", settings=settings)
    for change, message in [
        ({"path": "nowhere"}, "reward.videoscore.path: nowhere: no such folder"),
        ({"path": str(folder)}, "reward.videoscore.path: .* holds 'VideoScorer' and no Idefics2"),
        (
            {"path": str(folder), "query_prompt": "none.txt"},
            "reward.videoscore.query_prompt: there is no file none.txt",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            load_reward("videoscore", settings | {"videoscore": settings["videoscore"] | change})
    with pytest.raises(
        UserError, match="--scorers: videoreward has its folder in a run's config only; give the folder"
    ):
        load_rewards("videoreward", field="--scorers")


def test_errors_name_the_field_that_named_the_scorer():
    with pytest.raises(UserError, match=r"^held_out\.scorers: 'nobody' is no scorer"):
        load_rewards("nobody")
    with pytest.raises(UserError, match=r"^--scorer: 'nobody' is no scorer"):
        load_scorer("nobody", "--scorer")


def test_a_written_folder_is_read_back(folder, parts):
    back = read_scorer(folder)
    assert back.config == parts.config
    assert (folder / "recipe.json").is_file()
    for old, new in zip(jax.tree.leaves(parts.params), jax.tree.leaves(back.params), strict=True):
        assert new.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(old).astype(np.float16).astype(np.float32), new)


def test_a_folder_is_a_reward_by_its_name(folder):
    reward = load_reward(str(folder))
    assert isinstance(reward, Reward)
    assert reward.name == "mine"
    assert reward.trains and reward.jittable
    assert reward.dimensions == DIMENSIONS


def test_the_judge_only_judges():
    judge = load_reward("judge")
    assert isinstance(judge, Reward)
    assert not judge.trains and not judge.jittable
    with pytest.raises(UserError, match="judge is for evaluation only"):
        load_rewards("judge", training=True)
    with pytest.raises(UserError, match="is empty"):
        load_rewards(" ", training=True)


def test_the_judge_scores_clean_clips_above_degraded_ones():
    rows = world.caption_indices("tune")[:8]
    captions = [world.make_caption(world.ALL_ATTRIBUTES[row]) for row in rows]
    clean, degraded = (
        np.asarray(world.to_uint8(world.render_videos(jax.random.key(0), rows, p).frames)) for p in (0.0, 1.0)
    )
    scorer = load_scorer("judge")
    good, bad = scorer(clean, captions), scorer(degraded, captions)
    assert set(good) == {"overall", *world_measures()}
    assert good["overall"].mean() > bad["overall"].mean() + 0.5
    assert good["overall"].dtype == np.float32


def world_measures():
    from vpo_jax.shapes.judge import MEASURES

    return MEASURES


def test_foreign_prompts_are_no_prompts_for_the_judge():
    with pytest.raises(UserError, match="the judge reads captions"):
        load_scorer("judge")(_videos(1), "a dog on a beach")


def test_scores_are_by_dimension_within_the_declared_range(folder):
    scores = load_scorer(folder)(_videos(3), ["a small red circle", 'quotes " and <b>', ""])
    assert tuple(scores) == DIMENSIONS
    for values in scores.values():
        assert values.shape == (3,) and values.dtype == np.float32
        assert (values > 1.0).all() and (values < 4.0).all()


@pytest.mark.slow
def test_scores_do_not_depend_on_the_batch(folder):
    scorer = load_scorer(folder)
    videos, prompts = _videos(33), world.captions("tune")[:33]
    together = scorer(videos, prompts)
    alone = scorer(videos[32:], prompts[32:])
    for name, values in together.items():
        # Batches of other sizes are other programs: float32 rounding only.
        np.testing.assert_allclose(values[32:], alone[name], atol=2e-5)


@pytest.mark.parametrize(("frames", "size"), [(1, 32), (2, 32), (24, 64), (5, 20)])
def test_clips_of_any_length_and_size_are_scored(folder, frames, size):
    scores = load_scorer(folder)(_videos(2, frames, size), ["a", "b"])
    assert all(np.isfinite(values).all() for values in scores.values())


def test_long_and_strange_prompts_are_cut_and_read(folder):
    reward = load_reward(str(folder))
    ids = reward.prepare(["word " * 500, "🎈 <script>", ""])["input_ids"]
    assert ids.shape == (3, 16) and ids.dtype == np.int32
    assert (ids[2] == 0).all()


def test_wrong_videos_are_user_errors(folder):
    scorer = load_scorer(folder)
    with pytest.raises(UserError, match="uint8"):
        scorer(_videos(1).astype(np.float32), "a")
    with pytest.raises(UserError, match="2 for 1 videos"):
        scorer(_videos(1), ["a", "b"])
    with pytest.raises(UserError, match="videos: must be"):
        scorer(_videos(1)[0], "a")


def test_a_broken_folder_names_the_file(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_reward(str(tmp_path / "empty"))
    config = json.loads((folder / "config.json").read_text())
    for change, message in [
        ({"_class_name": "Other"}, "'Other', which is no scorer"),
        ({"depth": 3}, "scorer.depth"),
        ({"ranges": [[1, 4]]}, "scorer.ranges"),
        ({"vocab_size": 5}, "vocab_size 5"),
        ({"hidden": 17}, "wrong shape"),
    ]:
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=message):
            load_reward(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or cut short"):
        load_reward(str(folder))


def test_nothing_is_written_over_a_folder_that_is_no_scorer(parts, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("meow")
    with pytest.raises(UserError, match="no scorer"):
        write_scorer(tmp_path / "photos", parts)
    assert (tmp_path / "photos" / "cat.txt").is_file()


def test_frames_are_taken_evenly_and_never_twice():
    assert even_indices(5, 8) == (0, 1, 2, 3, 4)
    assert even_indices(16, 8)[0] == 0 and even_indices(16, 8)[-1] == 15
    assert all(len(set(even_indices(n, 8))) == min(n, 8) for n in range(1, 60))
