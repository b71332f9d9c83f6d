import re

import pytest
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from vpo_jax.pipeline import load_pipeline
from vpo_jax.runtime import backend
from vpo_jax.runtime.cli import flatten_config, load_config, override
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import AXES, Meshes, make_mesh, make_meshes
from vpo_jax.training.check import FIELDS, check, check_inputs, check_meshes, cpu_devices


def changed(key, value):
    config = ConfigDict(load_config("configs/vpo.py").to_dict(), type_safe=False)
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    return config


@pytest.mark.parametrize("preset", ["", "tiny"])
def test_the_shipped_configs_pass_and_hold_every_field(preset):
    config = load_config(f"configs/vpo.py:{preset}")
    check(config)
    assert {key for key, _ in flatten_config(config)} == set(FIELDS)


@pytest.mark.parametrize("preset", ["wan", "wan_14b", "wan22_a14b", "wan22_5b"])
def test_a_preset_of_wan_wants_a_model_and_prompts(preset):
    config = load_config(f"configs/vpo.py:{preset}")
    for key in ("model.path", "data.prompts"):
        with pytest.raises(UserError, match=re.escape(key)):
            check(config)
        override(config, [(key, "given")])
    check(config)


@pytest.mark.parametrize("preset", ["custom", "modelscope", "zeroscope", "videocrafter2"])
def test_a_preset_of_no_model_wants_a_model_prompts_and_a_scorer_and_nothing_else(preset):
    config = load_config(f"configs/vpo.py:{preset}")
    for key in ("model.path", "data.prompts", "reward.scorers"):
        with pytest.raises(UserError, match=re.escape(key)):
            check(config)
        override(config, [(key, "given")])
    check(config)
    assert {key for key, _ in flatten_config(config)} == set(FIELDS)
    assert config.train.remat and config.model.dtype == ("float32" if preset == "custom" else "bfloat16")


def test_adapters_are_not_merged_into_kernels_that_would_round_them_away():
    config = changed("lora.merge", True)
    check(config)
    config.model.dtype = "bfloat16"
    with pytest.raises(UserError, match=r"lora\.merge: .*model\.dtype"):
        check(config)

    config.model.dtype, config.lora.rank = "float32", 0
    with pytest.raises(UserError, match=r"lora\.merge: .*no adapters"):
        check(config)


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.8, 0.2), (1.0, 1.0)])
def test_timesteps_need_room(low, high):
    config = changed("preference.timestep_low", low)
    config.preference.timestep_high = high
    with pytest.raises(UserError, match=r"timestep_low: .*timestep_high"):
        check(config)


def test_extrapolation_wants_an_average_and_fresh_adapters():
    config = changed("ema.extrapolation", 2.0)
    check(config)
    config.lora.path = "adapter"
    with pytest.raises(UserError, match=r"ema\.extrapolation: .*lora\.path"):
        check(config)
    config.ema.decay, config.lora.path = 0.0, ""
    with pytest.raises(UserError, match=r"ema\.extrapolation: .*ema\.decay"):
        check(config)


def test_an_adapter_cannot_start_full_fine_tuning():
    config = changed("lora.path", "adapter")
    config.lora.rank = 0
    with pytest.raises(UserError, match=r"lora\.path"):
        check(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rollout.candidates", 1, "rollout.candidates: 1 leaves nothing to prefer; give 2 or more"),
        ("rollout.trunk_level", 1.5, "rollout.trunk_level: 1.5 is not a number from 0 to 1 (0 = independent"),
        ("train.steps", 0, "train.steps: 0 is not a whole number from 1 up"),
        ("train.steps", 2.0, "train.steps: 2.0 is not a whole number"),
        ("train.steps", True, "train.steps: True is not a whole number"),
        ("preference.beta", 0.0, "preference.beta: 0.0 is not a number above 0"),
        ("preference.beta", float("nan"), "preference.beta: nan is not a number above 0"),
        ("optimizer.learning_rate", float("inf"), "optimizer.learning_rate: inf is not a number above 0"),
        ("optimizer.learning_rate", "1e-4", "optimizer.learning_rate: '1e-4' is not a number above 0"),
        ("model.path", "", "model.path: '' is not a diffusers folder, a hub id, or shapes"),
        ("model.dtype", "float64", "model.dtype: 'float64' is not one of float32, bfloat16"),
        ("reference.schedule", "never", "reference.schedule: 'never' is not one of frozen, refresh, ema, adaptive"),
        ("ema.decay", 1.0, "ema.decay: 1.0 is not a number from 0 to below 1"),
        ("mesh.data", 0, "mesh.data: 0 is not a number from 1 up, or -1"),
        ("train.remat", 1, "train.remat: 1 is not true or false"),
        ("train.microbatch", 3, "train.microbatch: 3 does not divide 32, half of the 64 videos that"),
        ("rollout.microbatch", 7, "rollout.microbatch: 7 does not divide the step's 64 videos"),
        ("train.stepz", 3, "train.stepz: unknown config key; did you mean train.steps?"),
        ("reward.timeout", -1.0, "reward.timeout: -1.0 is not a number from 0 to 1e+08 seconds (0 = no limit)"),
        ("reward.videoscore.frame_choice", "all", "'all' is not one of arange, linspace"),
        ("reward.videoscore.max_frames", 0, "reward.videoscore.max_frames: 0 is not a whole number from 1 up"),
        ("reward.videoreward.video_fps", 0.0, "reward.videoreward.video_fps: 0.0 is not a number above 0"),
        ("seed", -1, "seed: -1 is not a whole number from 0 up"),
        ("algorithm.name", "ppo", "algorithm.name: 'ppo' is not one of dpo"),
        ("preference.pairs", "some", "'some' is not one of best_worst, top_k, all, group, listwise"),
        ("preference.top_k", 0, "preference.top_k: 0 is not a whole number from 1 up"),
        ("profile.steps", "3:3", "profile.steps: '3:3' is not FIRST:LAST with 1 <= FIRST < LAST; write 3:5"),
        ("profile.steps", "all", "profile.steps: 'all' is not FIRST:LAST"),
    ],
)
def test_a_value_that_no_run_could_have_is_named_with_the_fix(key, value, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check(changed(key, value))


def test_a_missing_field_is_named():
    config = changed("seed", 0)
    del config.preference.beta
    with pytest.raises(UserError, match=r"preference\.beta: missing in the config; give a number above 0"):
        check(config)


def test_a_batch_that_the_mesh_does_not_divide_is_named_with_one_that_it_does():
    one = Meshes.of(make_mesh())
    eight = AbstractMesh((4, 2, 1, 1), AXES)
    check_meshes(changed("train.prompts_per_step", 16), one)
    with pytest.raises(UserError, match=r"train\.prompts_per_step: 12 is not a multiple of 8.*\(4 x 2\); choose 16"):
        check_meshes(changed("train.prompts_per_step", 12), one._replace(update=eight))
    with pytest.raises(UserError, match=r"train\.microbatch: 4 is not a multiple of 8"):
        check_meshes(changed("train.microbatch", 4), one._replace(update=eight))
    with pytest.raises(
        UserError, match=r"rollout\.microbatch: 2 is not a multiple of 8, into which mesh\.rollout shards"
    ):
        check_meshes(changed("rollout.microbatch", 2), one._replace(rollout=eight))
    config = changed("rollout.trunk_level", 0.5)
    config.train.prompts_per_step, config.rollout.microbatch = 12, 8
    with pytest.raises(
        UserError, match=r"train\.prompts_per_step: 12 is not a multiple of 8, into which mesh\.rollout"
    ):
        check_meshes(config, one._replace(rollout=eight))
    three = AbstractMesh((3, 1, 1, 1), AXES)
    videos = r"train\.prompts_per_step x rollout\.candidates: 64 is not a multiple of 3"
    with pytest.raises(UserError, match=videos + r", into which mesh\.score shards it"):
        check_meshes(changed("rollout.microbatch", 0), one._replace(score=three))
    apart = changed("rollout.microbatch", 0)
    apart.reward.devices = 3
    with pytest.raises(UserError, match=videos + r", into which reward\.devices shards it"):
        check_meshes(apart, one._replace(score=three))


@pytest.mark.parametrize(
    ("cores", "changes", "devices"),
    [
        (1, {}, 1),
        (2, {}, 2),
        (7, {}, 4),
        (64, {}, 8),  # prompts_per_step
        (64, {"train.microbatch": 12}, 4),
        (64, {"rollout.microbatch": 2}, 2),
        (64, {"train.prompts_per_step": 3, "rollout.microbatch": 0}, 3),
        (64, {"mesh.fsdp": 2}, 8),
        (64, {"mesh.fsdp": 3}, 1),  # make_mesh says what is wrong
        (64, {"mesh.cpu_devices": 5}, 5),
        (64, {"mesh.data": 2}, 1),
        (64, {"mesh.score": "fsdp=2"}, 1),
        (64, {"reward.devices": 1}, 1),
        (64, {"model.path": "owner/name"}, 1),
    ],
)
def test_a_cpu_is_divided_as_far_as_its_cores_and_the_batches_go(monkeypatch, cores, changes, devices):
    monkeypatch.setattr(backend, "count_cores", lambda: cores)
    config = load_config("configs/vpo.py")
    override(config, [(key, str(value)) for key, value in changes.items()])
    assert cpu_devices(config) == devices


def test_every_device_holds_a_copy_so_large_models_and_scorers_keep_one_device(monkeypatch, tmp_path):
    monkeypatch.setattr(backend, "count_cores", lambda: 8)
    config = load_config("configs/vpo.py")
    for folder, changes in (
        ("model/unet", {"model.path": tmp_path / "model"}),
        ("scorer", {"held_out.scorers": f"judge, {tmp_path / 'scorer'}"}),
        ("other", {"reward.scorers": "shapes,videoscore", "reward.videoscore.path": tmp_path / "other"}),
    ):
        override(config, [(key, str(value)) for key, value in changes.items()])
        (tmp_path / folder).mkdir(parents=True)
        for size, devices in ((5 * 10**8, 8), (10**9 + 1, 1), (10, 8)):
            with (tmp_path / folder / "a.safetensors").open("wb") as file:
                file.truncate(size)
            assert cpu_devices(config) == devices


@pytest.mark.parametrize("text", ["fsdp", "fsdp=0", "fsdp=2,fsdp=4", "frames=2", "data=1e3", "tensor=", "=2"])
def test_a_role_s_mesh_is_axes_with_sizes(text):
    for key in ("mesh.rollout", "mesh.score"):
        with pytest.raises(UserError, match=rf"{key}: '.*' is not a size of an axis; give some of data, fsdp"):
            check(changed(key, text))
        with pytest.raises(UserError, match=rf"{key}: 'data=-1,fsdp=-1' gives the rest to several axes"):
            check(changed(key, "data=-1,fsdp=-1"))
        check(changed(key, "context=2, fsdp=4"))


def test_scorers_apart_need_pairs_that_may_be_a_step_old():
    config = changed("reward.devices", 2)
    with pytest.raises(UserError, match=r"preference\.max_pair_age: .* give 1 or more, or set reward\.devices=0"):
        check(config)
    config.preference.max_pair_age = 1
    check(config)


@pytest.mark.parametrize("pairs", ["best_worst", "top_k", "all", "group", "listwise"])
def test_a_group_of_one_candidate_is_refused_for_every_form(pairs):
    config = changed("preference.pairs", pairs)
    config.rollout.candidates = 1
    with pytest.raises(UserError, match=r"rollout\.candidates: 1 leaves nothing to prefer; give 2 or more"):
        check(config)


def test_the_best_and_the_worst_are_different_videos():
    config = changed("preference.pairs", "top_k")
    config.rollout.candidates, config.preference.top_k, config.rollout.microbatch = 5, 3, 0
    with pytest.raises(UserError, match=r"preference\.top_k: 3 best and 3 worst of .*=5 .*at most 2"):
        check(config)
    config.preference.top_k = 2
    check(config)
    config.preference.pairs, config.preference.top_k = "group", 3  # not read
    check(config)


def test_a_listwise_loss_needs_a_temperature():
    config = changed("preference.pairs", "listwise")
    config.preference.label_temperature = 0.0
    with pytest.raises(UserError, match=r"preference\.label_temperature: .*number above 0"):
        check(config)
    config.preference.label_temperature = 0.5
    check(config)


def test_microbatches_divide_the_videos_that_are_learnt_from_and_may_split_a_group():
    config = changed("preference.pairs", "group")
    config.train.prompts_per_step, config.rollout.candidates, config.rollout.microbatch = 3, 4, 0
    config.train.microbatch = 1  # two videos of a group of four
    check(config)
    config.train.microbatch = 4
    with pytest.raises(UserError, match=r"train\.microbatch: 4 does not divide 6, half of the 12 videos"):
        check(config)
    config.preference.pairs = "best_worst"
    with pytest.raises(UserError, match=r"train\.microbatch: 4 does not divide train\.prompts_per_step=3; choose"):
        check(config)


def test_cudnn_is_refused_where_it_cannot_compute():
    config = changed("model.attention", "cudnn")
    check(config)  # a plan for GPUs may be made anywhere
    with pytest.raises(UserError, match=r"model\.attention: cudnn wants an NVIDIA GPU and found cpu; take xla"):
        check_inputs(config, load_pipeline("shapes"), [], [], make_meshes(config.mesh))
