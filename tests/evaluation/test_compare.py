import dataclasses
import io
import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from tests.running import run_program
from vpo_jax.evaluation.compare import (
    Sampling,
    compare,
    compare_scores,
    evaluate,
    shards_needed,
    table,
    write_json,
)
from vpo_jax.evaluation.videos import write_videos
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.video import read_video


class FakePipeline:
    """Videos made of their noise alone, so that a test can see which noise they got."""

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain
        self.batches: list[tuple[int, dict[str, Any]]] = []

    params: Any = {}  # noqa: RUF012

    def on_mesh(self, mesh):
        return self

    def latent_shape(self, num_frames: int | None, height: int | None, width: int | None) -> tuple[int, ...]:
        return (num_frames or 4, 3, 2, 3)

    def __call__(self, prompts: list[str], latents: Any = None, **arguments: Any) -> np.ndarray:
        self.batches.append((len(prompts), arguments))
        assert len(prompts) == len(latents)
        return np.clip(128 + 20 * self.gain * np.asarray(latents), 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class FakeReward:
    """Brightness of the first and last frame, and the length of the prompt."""

    name: str = "fake"
    jittable: bool = True
    trains: bool = True
    dimensions: tuple[str, ...] = ("brightness", "words")
    ranges: tuple[tuple[float, float], ...] = ((0, 255), (0, 10))
    params: Any = dataclasses.field(default_factory=dict)

    def frame_indices(self, num_frames: int) -> tuple[int, ...]:
        return (0, num_frames - 1)

    def prepare(self, prompts: list[str]) -> np.ndarray:
        return np.array([len(prompt.split()) for prompt in prompts], np.float32)

    def score(self, params: Any, videos: Any, prepared: Any) -> Any:
        assert videos.shape[1] == 2
        xp = jnp if self.jittable else np
        return xp.stack([xp.mean(videos.astype(np.float32), (1, 2, 3, 4)), xp.asarray(prepared)], axis=1)


PROMPTS = ["a b", "", "c", "d e f", "g"]


def test_scores_do_not_depend_on_the_batch():
    small, videos = evaluate(FakePipeline(), PROMPTS, [FakeReward()], Sampling(samples=2, batch=3), keep=5)
    large, others = evaluate(FakePipeline(), PROMPTS, [FakeReward()], Sampling(samples=2, batch=64), keep=5)
    assert small["fake/brightness"].shape == (5, 2)
    for name in small:
        np.testing.assert_array_equal(small[name], large[name])
    np.testing.assert_array_equal(videos, others)


def test_the_last_batch_is_filled_up_so_that_all_have_one_shape():
    pipeline = FakePipeline()
    evaluate(pipeline, PROMPTS, [FakeReward()], Sampling(batch=3))
    assert [size for size, _ in pipeline.batches] == [3, 3]


def test_prompts_and_samples_get_noise_of_their_own_that_the_seed_fixes():
    def brightness(**sampling):
        return evaluate(FakePipeline(), PROMPTS, [FakeReward()], Sampling(samples=3, **sampling))[0]["fake/brightness"]

    assert len(np.unique(brightness())) == 15
    np.testing.assert_array_equal(brightness(seed=1), brightness(seed=1))
    assert not np.array_equal(brightness(seed=1), brightness(seed=2))


def test_a_model_against_itself_wins_one_half_of_everything():
    result = compare(FakePipeline(), FakePipeline(), PROMPTS, [FakeReward()])
    for row in result.rows:
        assert (row.win_rate, row.low, row.high, row.difference) == (0.5, 0.5, 0.5, 0.0)


def test_choices_reach_the_pipeline_and_what_is_left_out_does_not():
    pipeline = FakePipeline()
    evaluate(pipeline, PROMPTS, [FakeReward()], Sampling(num_frames=6, guidance_scale=2.0))
    assert pipeline.batches[0][1] == {"num_frames": 6, "guidance_scale": 2.0}


def test_a_judge_of_the_host_and_a_jitted_scorer_are_compared_alike():
    rewards = [FakeReward(), FakeReward("judge", jittable=False, trains=False)]
    result = compare(FakePipeline(1.0), FakePipeline(2.0), PROMPTS, rewards)
    ours, judges = result.row("fake/brightness"), result.row("judge/brightness")
    assert judges.base_mean == pytest.approx(ours.base_mean, rel=1e-6)
    assert judges.win_rate == ours.win_rate


def test_every_scorer_has_the_role_it_was_given_and_motion_is_always_shown():
    roles = {"fake": "trained", "other": "used for selection"}
    rewards = [FakeReward("fake"), FakeReward("other"), FakeReward("third")]
    rows = compare(FakePipeline(), FakePipeline(2.0), PROMPTS, rewards, roles=roles).rows
    assert {row.scorer: row.role for row in rows} == roles | {"third": "unknown", "frames": "measured"}
    assert any(row.name == "frames/change" and row.tuned_mean > row.base_mean for row in rows)


def test_kept_videos_are_the_first_prompts_first_samples():
    sampling = Sampling(samples=2, batch=4)
    result = compare(FakePipeline(), FakePipeline(), PROMPTS, [FakeReward()], sampling, keep=2)
    assert result.base_videos.shape == (2, 4, 3, 2, 3)
    first_and_last = result.base_videos[:, [0, -1]].astype(np.float32).mean((1, 2, 3, 4))
    np.testing.assert_allclose(first_and_last, result.base_scores["fake/brightness"][:2, 0], rtol=1e-6)


def test_no_prompts_are_refused():
    with pytest.raises(UserError, match="prompts"):
        evaluate(FakePipeline(), [], [FakeReward()], Sampling())


def test_every_video_gets_one_score_and_a_single_frame_has_no_change():
    scores, _ = evaluate(FakePipeline(), ["a", "b c", ""], [FakeReward()], Sampling(num_frames=1))
    np.testing.assert_array_equal(scores["fake/words"][:, 0], [1, 2, 0])
    np.testing.assert_array_equal(scores["frames/change"][:, 0], [0, 0, 0])


def test_the_table_fits_80_columns_and_shows_every_dimension():
    names = [f"shapes/{d}" for d in ("visual_quality", "text_to_video_alignment")] + ["frames/change"]
    rng = np.random.default_rng(0)
    base = {name: rng.normal(2.5, 1, (8, 1)).astype(np.float32) for name in names}
    tuned = {name: scores + 1 for name, scores in base.items()}
    result = compare(FakePipeline(), FakePipeline(), PROMPTS, [FakeReward()])
    result = dataclasses.replace(result, rows=compare_scores(base, tuned, {"shapes": "trained"}))
    out = io.StringIO()
    Console(file=out, width=80).print(table(result))
    text = out.getvalue()
    assert "…" not in text
    for word in ("shapes (trained)", "text_to_video_alignment", "100 % (100 to 100)", "frames (measured)"):
        assert word in text


def test_a_scorer_named_like_markup_is_shown_as_it_is():
    rows = compare_scores({"[bold]/x": np.ones((2, 1))}, {"[bold]/x": np.ones((2, 1))})
    result = dataclasses.replace(compare(FakePipeline(), FakePipeline(), PROMPTS, [FakeReward()]), rows=rows)
    out = io.StringIO()
    Console(file=out, width=80).print(table(result))
    assert "[bold]" in out.getvalue()


def test_evaluation_json_is_strict_json_with_null_for_nan(tmp_path):
    result = compare(FakePipeline(), FakePipeline(2.0), PROMPTS, [FakeReward()])
    result.base_scores["fake/words"][0, 0] = np.nan
    result = dataclasses.replace(result, rows=compare_scores(result.base_scores, result.tuned_scores))
    write_json(tmp_path / "out" / "evaluation.json", result)

    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads((tmp_path / "out" / "evaluation.json").read_text(), parse_constant=refuse)
    assert document["base_scores"]["fake/words"][0] == [None]
    row = next(row for row in document["rows"] if row["dimension"] == "words")
    assert row["prompts"] == 4 and row["win_rate"] == 0.5
    assert document["prompts"] == PROMPTS
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["evaluation.json"]


def test_videos_are_written_as_mp4_and_webp(tmp_path):
    result = compare(FakePipeline(), FakePipeline(2.0), PROMPTS, [FakeReward()], keep=1)
    write_videos(tmp_path, result)
    names = ["base_0000.mp4", "base_0000.webp", "side_by_side.webp", "tuned_0000.mp4", "tuned_0000.webp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    np.testing.assert_array_equal(read_video(tmp_path / "base_0000.webp")[:, ::64, ::64], result.base_videos[0])


@pytest.mark.parametrize(
    ("limit", "shards"), [(None, 1), (200, 1), (199, 2), (100, 2), (67, 3), (60, 6), (33, 6), (1, 6)]
)
def test_weights_are_sharded_only_as_far_as_half_a_device_s_memory_asks(limit, shards):
    assert shards_needed(100, limit, 6) == shards


@pytest.mark.slow
def test_weights_that_are_sharded_over_devices_give_the_same_comparison(model_folder):
    done = run_program("sharded_comparison.py", model_folder, devices=4)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [(mesh["data"], mesh["fsdp"]) for mesh in found["meshes"]] == [(4, 1), (2, 2)]
    assert found["cut"][0] == 0 < found["cut"][1]
    assert found["levels"] <= 1 and found["scores"] < 1e-3, found  # float32, and a pixel rounded the other way
