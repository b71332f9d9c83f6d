"""The recipe of the miniature VideoScore on a handful of videos: it runs, resumes, writes a folder that scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from vpo_jax.recipes import scorer_data as data
from vpo_jax.recipes import train_videoscore
from vpo_jax.recipes.train_scorer import Batch, Pools
from vpo_jax.rewards.loading import load_scorer
from vpo_jax.rewards.protocol import DIMENSIONS
from vpo_jax.rewards.query import FIELD
from vpo_jax.rewards.videoscore.folder import read_videoscore, write_videoscore
from vpo_jax.rewards.videoscore.query import IMAGE_TOKEN, QueryEncoder
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import flatten
from vpo_jax.shapes import world


@pytest.fixture
def pools():
    rows = jnp.asarray(world.caption_indices("train"))
    labelled = jax.jit(lambda key: data.make_videos(key, 16, rows, disturbed=False))(jax.random.key(0))
    return Pools(labelled, labelled, labelled.videos, labelled.rows)


@pytest.fixture
def small(monkeypatch):
    """One layer of everything, two videos of each kind."""
    whole = train_videoscore.make_config

    def make_config(tokenizer: Tokenizer):
        config = whole(tokenizer)
        vision = dataclasses.replace(config.vision, num_hidden_layers=1, hidden_size=16, intermediate_size=16)
        perceiver = dataclasses.replace(config.perceiver, resampler_depth=1)
        text = dataclasses.replace(config.text, num_hidden_layers=1)
        return dataclasses.replace(config, vision=vision, perceiver=perceiver, text=text)

    monkeypatch.setattr(train_videoscore, "make_config", make_config)
    monkeypatch.setattr(train_videoscore, "WITH_BASE", Batch(fresh=2, round_trip=2, denoised=2, pairs=7))


@pytest.mark.slow
def test_a_resumed_training_is_the_uninterrupted_one_and_its_folder_scores(small, pools, tmp_path):
    def train(folder: str, seconds: float | None = None):
        return train_videoscore.train(0, 2, 1e-3, pools, tmp_path / folder, seconds, seeing_steps=2)

    straight = train("straight")
    for stage, step in ("seeing", 1), ("videoscore", 1):
        with pytest.raises(TimeoutError, match="the same command goes on"):
            train("stopped", seconds=0.0)
        assert (tmp_path / "stopped" / stage / str(step)).is_dir()
    resumed = train("stopped")
    before = flatten(train_videoscore.make_start(straight.config, 0)()["scorer"])
    for path, value in flatten(straight.params).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(flatten(resumed.params)[path]), err_msg=path)
        if "score" in path:
            assert np.any(np.asarray(value) != np.asarray(before[path])), f"{path} has not learned"

    write_videoscore(tmp_path / "out", straight)
    again = read_videoscore(tmp_path / "out", len(DIMENSIONS))
    assert (again.config, again.query_prompt) == (straight.config, train_videoscore.QUERY)
    for path, value in flatten(again.params).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(flatten(straight.params)[path]), err_msg=path)
    captions = [world.make_caption(row) for row in world.ALL_ATTRIBUTES[:2]]
    scores = load_scorer(tmp_path / "out")(np.asarray(pools.samples[:2]), captions)
    assert set(scores) == set(DIMENSIONS) and all(np.isfinite(value).all() for value in scores.values())


@pytest.mark.slow
def test_the_scores_that_it_learns_are_those_that_the_reward_gives(small, pools, tmp_path):
    """The recipe asks as the reward does: the loss of no pairs is the mean of the reward's own squared errors."""
    tokenizer = train_videoscore.make_tokenizer()
    config = train_videoscore.make_config(tokenizer)
    queries = QueryEncoder(tokenizer, train_videoscore.QUERY, config.image_token_id, 4, 16)
    params = train_videoscore.make_start(config, 1)()
    loss = train_videoscore.make_loss(config, queries, Batch(fresh=3))
    key = jax.random.key(5)
    _, metrics = jax.jit(loss)(params, key, None)

    parts = train_videoscore.VideoScoreParts(
        config, params["scorer"], tokenizer, train_videoscore.PROCESSOR, train_videoscore.QUERY
    )
    write_videoscore(tmp_path / "out", parts)
    video_key, ask_key, _ = jax.random.split(key, 3)
    labelled, _ = jax.jit(train_videoscore.draw_videos, static_argnums=1)(video_key, Batch(fresh=3), None)
    rows, match = jax.vmap(data.ask)(jax.random.split(ask_key, 3), labelled.rows, labelled.freeze)
    captions = [world.make_caption(world.ALL_ATTRIBUTES[row]) for row in np.asarray(rows)]
    scores = load_scorer(tmp_path / "out")(np.asarray(labelled.videos), captions)
    truth = np.asarray(data.labels(labelled.goodness.at[:, data.ALIGNMENT].set(match)))
    for i, name in enumerate(DIMENSIONS):
        assert float(metrics[name]) == pytest.approx(float(np.mean((scores[name] - truth[:, i]) ** 2)), rel=1e-4), name


@pytest.mark.slow
def test_lessons_of_attributes_ask_for_what_the_caption_names_and_for_what_the_video_has(small):
    """Heads that answer nothing leave log(choices) an attribute; those that know one side answer that one alone."""
    tokenizer = train_videoscore.make_tokenizer()
    config = train_videoscore.make_config(tokenizer)
    queries = QueryEncoder(tokenizer, train_videoscore.QUERY, config.image_token_id, 4, 16)
    params = jax.jit(train_videoscore.make_start(config, 1))()
    loss, key = jax.jit(train_videoscore.make_loss(config, queries, Batch(fresh=3))), jax.random.key(5)
    chance = np.mean([np.log(len(values)) for values in world.VALUES])
    _, metrics = loss(params, key, None)
    assert float(metrics["named"]) == pytest.approx(chance, rel=1e-5)
    assert float(metrics["drawn"]) == pytest.approx(chance, rel=1e-5)
    assert float(metrics["right"]) == pytest.approx(np.log(2), rel=1e-5)

    video_key, ask_key, _ = jax.random.split(key, 3)
    labelled, _ = jax.jit(train_videoscore.draw_videos, static_argnums=1)(video_key, Batch(fresh=3), None)
    asked, _ = jax.vmap(data.ask)(jax.random.split(ask_key, 3), labelled.rows, labelled.freeze)
    for name, rows in (("named", asked), ("drawn", labelled.rows)):
        attributes = np.asarray(world.ALL_ATTRIBUTES)[np.asarray(rows)]  # [3, 5]
        firsts = np.cumsum([0, *(len(values) for values in world.VALUES)])[:-1]
        counts = np.zeros(sum(len(values) for values in world.VALUES))
        np.add.at(counts, firsts + attributes, 1.0)
        params["lessons"][name]["bias"] = jnp.asarray(counts, jnp.float32)  # what stands there most often is likelier
        _, metrics = loss(params, key, None)
        expected = []
        for i, (first, values) in enumerate(zip(firsts, world.VALUES, strict=True)):
            part = counts[first : first + len(values)]
            expected.append(np.mean(np.log(np.exp(part).sum()) - part[attributes[:, i]]))
        assert float(metrics[name]) == pytest.approx(np.mean(expected), rel=1e-5), name


@pytest.mark.slow
def test_it_reads_with_slower_eyes_once_it_has_learnt_to_see(small, tmp_path, monkeypatch):
    begun = []

    def optimise(loss, start, seed, steps, rate, pools, checkpoints, seconds, rule):
        begun.append((checkpoints.name, steps, rule))
        return start()

    monkeypatch.setattr(train_videoscore, "optimise", optimise)
    rules = train_videoscore.muon, train_videoscore.muon_that_sees
    train_videoscore.train(0, 5, 1e-3, None, tmp_path, seeing_steps=3)
    assert begun == [("seeing", 3, rules[0]), ("videoscore", 5, rules[1])]
    begun.clear()
    parts = train_videoscore.train(0, 5, 1e-3, None, tmp_path)
    assert begun == [("videoscore", 5, rules[0])]
    begun.clear()
    train_videoscore.train(0, 5, 1e-3, None, tmp_path, start=parts.params)
    assert begun == [("videoscore", 5, rules[1])]


def test_a_folder_that_the_recipe_cannot_go_on_from_is_refused_before_it_trains(small, tmp_path):
    flags = [f"--workdir={tmp_path / 'work'}", f"--output={tmp_path / 'out'}"]
    tokenizer = train_videoscore.make_tokenizer()
    config = train_videoscore.make_config(tokenizer)
    params = jax.jit(train_videoscore.make_start(config, 0))()["scorer"]
    processor, query = train_videoscore.PROCESSOR, train_videoscore.QUERY
    parts = train_videoscore.VideoScoreParts(config, params, tokenizer, processor, query)
    write_videoscore(tmp_path / "small", parts)
    with pytest.raises(UserError, match=r"recipe\.json: no such file"):
        train_videoscore.main([*flags, f"--start={tmp_path / 'small'}"])
    other = dataclasses.replace(parts.config, text=dataclasses.replace(parts.config.text, rope_theta=5.0))
    write_videoscore(tmp_path / "other", dataclasses.replace(parts, config=other))
    with pytest.raises(UserError, match=r"--start: .* is a VideoScore of other sizes"):
        train_videoscore.main([*flags, f"--start={tmp_path / 'other'}"])
    assert not (tmp_path / "work").exists() and not (tmp_path / "out").exists()


def test_every_caption_fits_and_every_word_has_a_token():
    tokenizer = train_videoscore.make_tokenizer()
    assert IMAGE_TOKEN in tokenizer.get_vocab()
    unknown = tokenizer.token_to_id("[UNK]")
    lengths = []
    for row in world.ALL_ATTRIBUTES:
        ids = tokenizer.encode(world.make_caption(row)).ids
        assert unknown not in ids
        lengths.append(len(ids))
    assert max(lengths) <= train_videoscore._CAPTION_TOKENS
    assert unknown not in tokenizer.encode(train_videoscore.QUERY.replace(FIELD, "")).ids


@pytest.mark.slow
def test_what_frames_show_is_learnt_from_what_was_drawn(small):
    """With heads that answer nothing, the errors are the mean squares of the facts and of their differences."""
    tokenizer = train_videoscore.make_tokenizer()
    config = train_videoscore.make_config(tokenizer)
    params = jax.jit(train_videoscore.make_start(config, 0))()
    key, rows = jax.random.key(2), jnp.asarray(world.caption_indices("train"))
    value, metrics = jax.jit(train_videoscore.make_seeing_loss(config, 4))(params, key, None)
    video_key, frame_key = jax.random.split(key)
    _, facts = jax.jit(lambda key: data.make_known_videos(key, 4, rows))(video_key)
    first, second = jax.random.choice(frame_key, world.NUM_FRAMES, (2,), replace=False)
    facts = np.asarray(facts)[:, [first, second]]
    for i, name in enumerate(data.SHOWN):
        assert float(metrics[name]) == pytest.approx(float(np.square(facts[..., i]).mean()), rel=1e-5), name
    differ = float(np.square(facts[:, 1] - facts[:, 0]).mean())
    assert differ > 0.01 and float(metrics["differ"]) == pytest.approx(differ, rel=1e-5)
    assert float(value) == pytest.approx(float(np.square(facts).mean()) + differ, rel=1e-5)


@pytest.mark.slow
def test_what_sees_learns_slower_than_what_reads(small):
    tokenizer = train_videoscore.make_tokenizer()
    params = jax.jit(train_videoscore.make_start(train_videoscore.make_config(tokenizer), 0))()
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)

    def change(rule):
        optimizer = rule(lambda step: 1e-3)
        return flatten(jax.jit(optimizer.update)(grads, optimizer.init(params), params)[0])

    whole, slower = change(train_videoscore.muon), change(train_videoscore.muon_that_sees)
    shares = {path: float(jnp.abs(slower[path]).sum() / jnp.abs(whole[path]).sum()) for path in whole}
    sees = {path for path in shares if "vision_model" in path or "perceiver" in path or "modality" in path}
    assert 10 < len(sees) < len(shares) - 10
    for path, share in shares.items():
        assert share == pytest.approx(0.1 if path in sees else 1.0, rel=1e-4), path


def test_whitened_patches_have_unit_variance_and_do_not_go_together():
    frames = np.random.RandomState(0).uniform(size=(64, 8, 8, 3)).astype(np.float32)
    frames[..., 1] = 0.3 * frames[..., 1] + frames[..., 0]  # neither alike nor independent
    kernel, bias = train_videoscore.whiten(jnp.asarray(frames), 4, 60)
    patches = frames.reshape(64, 2, 4, 2, 4, 3).swapaxes(2, 3).reshape(-1, 48)
    seen = patches @ np.asarray(kernel).reshape(48, 60) + np.asarray(bias)
    np.testing.assert_allclose(seen.mean(0), 0.0, atol=1e-3)
    expected = np.diag(np.arange(60) < 48).astype(float)
    np.testing.assert_allclose(np.cov(seen.T, bias=True), expected, atol=0.15)  # the floor takes a part of the smallest
    np.testing.assert_allclose(np.diag(np.cov(seen.T, bias=True))[16:48], 1.0, atol=0.01)


@pytest.mark.parametrize(("flag", "said"), [("--steps=0", "at least 1"), ("--seeing_steps=-1", "0 or more")])
def test_no_training_begins_with_numbers_that_train_nothing(flag, said, tmp_path):
    with pytest.raises(UserError, match=rf"{flag.partition('=')[0]}: .*{said}"):
        train_videoscore.main([f"--workdir={tmp_path / 'work'}", f"--output={tmp_path / 'out'}", flag])
    assert not list(tmp_path.iterdir())
