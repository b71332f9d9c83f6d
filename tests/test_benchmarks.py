"""The embedded job's bars, cleared by a better model and missed by others; agreement with held-out scorers."""

import copy
import importlib.util
import json
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from vpo_jax.families.text_to_video_sd import published
from vpo_jax.pipeline import load_pipeline
from vpo_jax.rewards.loading import load_reward
from vpo_jax.rewards.videoscore import published as videoscore
from vpo_jax.runtime.cli import load_config, override
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import bytes_of, flatten
from vpo_jax.shapes import judge
from vpo_jax.training.check import check


def load(name):
    path = Path(__file__).resolve().parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))


@pytest.fixture
def learning():
    return load("learning")


def scores_of(rng, gain=0.0, steadier=1.0, slower=1.0):
    """96 prompts, one sample: a scorer, the judge's grades, and its measures at ten times a clean clip's."""
    noise = rng.normal(size=(96, 1))
    found = dict.fromkeys(("shapes/visual_quality", "shapes/dynamic_degree", "judge/overall"), noise + gain)
    found |= {f"judge/{name}": noise + gain for name in judge.MEASURES}
    clean = {name: np.full((96, 1), 10 * judge.CLEAN_MEAN[name]) for name in judge.MEASURES}
    clean["flicker"], clean["jitter"] = clean["flicker"] * steadier, clean["jitter"] * steadier
    clean["speed"] = clean["speed"] / slower
    return found | {f"raw/{name}": values for name, values in clean.items()}


TRAINED = ("shapes/visual_quality", "shapes/dynamic_degree")


def test_a_folder_that_is_no_finished_run_is_named(learning, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is no finished run"):
        learning.main([str(tmp_path)])


def test_a_better_model_clears_every_bar(learning):
    base, tuned = (scores_of(np.random.default_rng(0), **more) for more in ({}, {"gain": 0.5, "steadier": 0.7}))
    found = learning.bars(base, tuned, TRAINED)
    assert len(found) == 7 and all(cleared for _, _, cleared in found), found
    assert "-30.0%" in found[2][1]


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"gain": 0.0, "steadier": 0.7}, {0, 1}),
        ({"gain": 0.5, "steadier": 0.8}, {2}),
        ({"gain": 0.5, "steadier": 0.7, "slower": 1.2}, {3}),
        ({"gain": -0.5, "steadier": 0.7}, {0, 1, 4, 5, 6}),
    ],
)
def test_each_bar_can_be_missed(learning, change, missed):
    base, tuned = (scores_of(np.random.default_rng(0), **more) for more in ({}, change))
    found = learning.bars(base, tuned, TRAINED)
    assert {i for i, (_, _, cleared) in enumerate(found) if not cleared} == missed, found


def test_agreement_is_within_prompts_and_blind_to_what_prompts_differ_in():
    agreement = load("agreement")
    rng = np.random.default_rng(0)
    own = rng.normal(size=(40, 4))
    prompts = 100 * rng.normal(size=(40, 1))
    assert agreement.within_prompts(own + prompts, own) > 0.999
    assert agreement.within_prompts(own + prompts, -own - prompts) < -0.999
    assert abs(agreement.within_prompts(rng.normal(size=(40, 4)) + prompts, own + prompts)) < 0.3


def test_gradients_agree_on_what_they_share_and_on_no_noise():
    timesteps = load("timesteps")
    rng = np.random.default_rng(0)
    shared, of_pairs, of_draws = rng.normal(size=5000), rng.normal(size=(6, 1, 5000)), rng.normal(size=(6, 2, 5000))
    lengths = np.arange(1, 13).reshape(6, 2, 1)
    norm, same, other, _ = timesteps.agreement(shared * lengths)
    assert same > 0.999 and other > 0.999 and np.isclose(norm, 6.5 * np.linalg.norm(shared))
    _, same, other, _ = timesteps.agreement(of_draws)
    assert abs(same) < 0.03 and abs(other) < 0.03
    _, same, other, _ = timesteps.agreement(of_pairs + of_draws)
    assert 0.45 < same < 0.55 and abs(other) < 0.03
    _, same, other, _ = timesteps.agreement(shared + of_pairs + of_draws)
    assert 0.6 < same < 0.72 and 0.28 < other < 0.38
    errors = [timesteps.agreement(shared + rng.normal(size=(6, 2, 5000)))[3] for _ in range(2)]
    assert all(0.0 < error < 0.05 for error in errors), "between the spread of single cosines and none"


def test_bytes_on_a_ring_follow_the_kind_of_collective():
    scaling = load("scaling")
    assert scaling.wire_bytes({"all-reduce": 8.0}, 4) == 12.0
    assert (
        scaling.wire_bytes({"all-gather": 8.0, "reduce-scatter": 2.0, "collective-permute": 3.0}, 4) == 6.0 + 6.0 + 3.0
    )
    assert scaling.wire_bytes({"all-reduce": 8.0}, 1) == 0.0
    row = {"slice": "v5e:2x4", "chips": 8, "collectives": {"update": {"all-reduce": 2e6}, "rollout": {}},
           "sent": 14e6, "seconds": 1.5, "efficiency": 0.9876}  # fmt: skip
    shown = [next(iter(column.cells)) for column in scaling.table_of([row]).columns]
    assert shown == ["v5e:2x4", "8", "update all-reduce 2.0; rollout none", "14.0", "1.5000", "98.76%"]


def test_a_scorers_benchmark_runs_all_of_it_on_videos_that_count(monkeypatch, tmp_path):
    full = copy.deepcopy(videoscore.CONFIG)
    full["vision_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "image_size": 64}
    full["vision_config"] |= {"num_attention_heads": 2, "patch_size": 32}
    full["perceiver_config"] |= {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4}
    full["perceiver_config"] |= {"resampler_head_dim": 8, "num_key_value_heads": 2}
    full["text_config"] |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    full["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    monkeypatch.setattr(videoscore, "CONFIG", full)
    output = tmp_path / "found.json"
    scorers = load("scorers")
    scorers.main(["--videos=4", "--prompts=2", "--frames=3", "--size=48", "--repeats=1", f"--output={output}"])
    found = json.loads(output.read_text())
    assert (found["videos"], found["frames"], found["side"]) == (4, 3, 378)
    assert found["tokens"] == videoscore.QUERY_TOKENS + 3 * 6
    assert found["seconds_a_video"] > 0 and found["apart_from_xla"] == 0.0
    assert found["tflop_a_video"] * 4e12 > 3 * 4 * 2 * (378 // 32) ** 2 * 3 * 32**2 * 32  # patches alone

    with pytest.raises(UserError, match=r"--peer: .* videoscore alone"):
        scorers.main(["--scorer=videoreward", "--peer"])


@pytest.mark.slow
def test_stages_are_run_at_the_batch_of_a_step(tmp_path):
    output = tmp_path / "found.json"
    flags = ["--config=configs/vpo.py:tiny", "--config.train.prompts_per_step=3", "--stages=encode", "--repeats=1"]
    load("stages").main([*flags, f"--output={output}"])
    found = json.loads(output.read_text())["encode"]
    pipeline = load_pipeline("shapes")
    ids = 3 * pipeline.family.text_length * 4
    assert (found["batch"], found["argument_bytes"]) == (3, bytes_of(pipeline.params["text_encoder"]) + ids)
    assert found["seconds"] > 0 and found["floor"] > 0


@pytest.mark.slow
def test_random_folders_load_as_the_real_ones(tmp_path):
    full_size = load("full_size")
    full_size.make_base(tmp_path / "base", "small")
    full_size.make_videoscore(tmp_path / "videoscore", "small")
    pipeline, reward = load_pipeline(tmp_path / "base"), load_reward(str(tmp_path / "videoscore"))
    shipped, whole = load_pipeline("shapes"), load_reward("vpo_jax/shapes/assets/videoscore")
    for made, real in ((pipeline.params, shipped.params), (reward.params, whole.params)):
        assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, real)
        kernels = [
            np.float32(leaf) for path, leaf in flatten(made).items() if path.endswith("/kernel") and leaf.size > 1000
        ]
        assert all(0.8 < np.std(leaf) * np.prod(leaf.shape[:-1]) ** 0.5 < 1.2 for leaf in kernels)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^--folder: .*file/small cannot be written .*choose another"):
        load("full_size").main([f"--folder={tmp_path / 'file'}", "--size=small"])


def test_wrong_flags_are_named_before_anything_is_made(tmp_path):
    with pytest.raises(UserError, match=r"^train\.step: .*did you mean train\.steps"):
        load("full_size").main([f"--folder={tmp_path}", "--size=small", "--config.train.step=4"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"^--videos: 0 is too few; give 1 or more"):
        load("denoiser").main(["--videos=0"])


def test_a_finished_run_is_summed_up_without_its_first_step(tmp_path):
    full_size = load("full_size")
    lines = [{"step": i, "time/step": seconds, "time/rollout": 1.0} for i, seconds in enumerate((90.0, 3.0, 5.0, 4.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = full_size.summary(load_config("configs/vpo.py:tiny"), tmp_path)
    assert (found["first_step_seconds"], found["time/step"], found["steps"]) == (90.0, 4.0, 4)


@pytest.mark.slow
def test_a_denoisers_benchmark_runs_both_halves_of_a_guided_call(monkeypatch, tmp_path):
    small = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
    small |= {"attention_head_dim": 8, "cross_attention_dim": 16}
    monkeypatch.setitem(published.MODELSCOPE, "unet", published.MODELSCOPE["unet"] | small)
    output = tmp_path / "found.json"
    load("denoiser").main(["--videos=2", "--frames=2", "--size=64", "--repeats=1", f"--output={output}"])
    found = json.loads(output.read_text())
    assert found["seconds"] > 0 and found["apart_from_xla"] == 0.0
    first = 2 * 2 * 2 * 8 * 8 * 2 * 9 * 4 * 32  # guidance, videos, frames, latents: the first convolution alone
    assert 20 * first < found["tflop"] * 1e12 < 2000 * first


def finished_run(folder, judge, motion, alarms=()):
    folder.mkdir(parents=True)
    rows = [
        {"scorer": "judge", "dimension": "overall", "win_rate": judge},
        {"scorer": "shapes", "dimension": "dynamic_degree", "base_mean": 2.0, "tuned_mean": 2.0 * motion},
    ]
    (folder / "evaluation.json").write_text(json.dumps({"rows": rows}))
    line = {"step": 1, **{f"alarm/{name}": 1.0 for name in alarms}}
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 0}) + "\n" + json.dumps(line) + "\n")


def test_faults_are_run_once_and_counted_with_what_they_did(monkeypatch, tmp_path, capsys):
    faults, said = load("faults"), []
    outcomes = {
        "healthy-0": (0.9, 1.1),
        "healthy-1": (0.5, 0.9, ["motion_lost"]),
        "rate-0": (0.4, 1.0, ["winners_forgotten"]),
        "rate-1": (0.9, 0.8),
    }

    def run(words, **_):
        folder = Path(words[-1].removeprefix("--workdir="))
        said.append(words[3:])
        finished_run(folder, *outcomes[folder.name])
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(faults.subprocess, "run", run)
    words = ["--faults=healthy,rate", "--seeds=0,1", f"--workdir={tmp_path}", "--config.log.samples=1"]
    for _ in range(2):  # the second time nothing is left to run
        faults.main([*words, f"--output={tmp_path / 'found.json'}"])
    assert [one[-1].rpartition("/")[2] for one in said] == ["healthy-0", "rate-0", "healthy-1", "rate-1"]
    assert said[1][:-1] == [
        "--config=configs/vpo.py:shapes_wan", "--config.log.samples=1", "--config.optimizer.learning_rate=0.005",
        "--config.seed=0",
    ]  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(one["alarms"], one["harmed"]) for name in ("healthy", "rate") for one in found[name]] == [
        ([], False),
        (["motion_lost"], False),  # at the limits nothing is harmed
        (["winners_forgotten"], True),
        ([], True),
    ]
    line = next(line for line in capsys.readouterr().out.splitlines() if "rate" in line and "0.40 0.90" in line)
    assert [cell.strip() for cell in line.split("│")[1:6]] == ["rate", "2", "1", "2", "1"]


def test_a_fault_that_fails_ends_with_its_last_words(monkeypatch, tmp_path):
    faults = load("faults")
    failed = subprocess.CompletedProcess([], 2, "", "error: seed: no such number\n")
    monkeypatch.setattr(faults.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match="healthy-0: error: seed: no such number"):
        faults.main(["--faults=healthy", "--seeds=0", f"--workdir={tmp_path}"])
    for words, message in ((["--faults=none"], "there is no 'none'"), (["--seeds=a"], "'a' is not a whole number")):
        with pytest.raises(UserError, match=message):
            faults.main([*words, f"--workdir={tmp_path}"])


@pytest.mark.parametrize("fault", ["margin", "gate", "rate", "dimension", "still"])
def test_every_fault_is_a_config_that_a_run_could_have(fault):
    faults = load("faults")
    config = load_config("configs/vpo.py:shapes_wan")
    override(config, faults.broken_by(fault, config))
    check(config)
    assert config != load_config("configs/vpo.py:shapes_wan")
