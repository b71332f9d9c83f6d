import json
import os
import signal

import pytest

from tests.running import run_program, start_program
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.fingerprint import contents_of
from vpo_jax.runtime.workdir import completed_steps, open_workdir

CONFIG = {
    "seed": 0,
    "train": {"steps": 12},
    "mesh": {"data": -1},
    "eval": {"every": 5},
    "reference": {"every": 3},
    "log": {"samples": 4},
    "optimizer": {"learning_rate": 1e-4},
}


def with_value(key, value):
    config = json.loads(json.dumps(CONFIG))
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return config


def test_a_new_directory_holds_the_config_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with open_workdir(tmp_path / "a" / "b", CONFIG) as workdir:
        assert not workdir.resumed and workdir.completed_steps is None
        assert json.loads((workdir.path / "config.json").read_text()) == CONFIG
        environment = json.loads((workdir.path / "environment.json").read_text())
        assert environment["versions"]["jax"] and environment["devices"] and "commit" in environment
        assert environment["flags"]["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=true"
        assert "hf_secret" not in str(environment)


def test_the_same_config_comes_back_and_complete_is_remembered(tmp_path):
    with open_workdir(tmp_path, CONFIG) as workdir:
        workdir.complete(12)
    with open_workdir(tmp_path, CONFIG) as workdir:
        assert workdir.resumed and workdir.completed_steps == 12


@pytest.mark.parametrize(
    ("key", "value"),
    [("mesh.data", 8), ("train.steps", 24), ("eval.every", 1), ("reference.every", 4), ("log.samples", 0)],
)
def test_what_may_differ_on_resume_differs(tmp_path, key, value):
    open_workdir(tmp_path, CONFIG).close()
    open_workdir(tmp_path, with_value(key, value)).close()
    assert json.loads((tmp_path / "config.json").read_text()) == with_value(key, value)


@pytest.mark.parametrize(
    ("key", "was", "value", "numbers"),
    [
        ("rollout.microbatch", 0, 2, "videos, their scores and losses"),
        ("train.microbatch", 0, 1, "losses and gradients"),
        ("train.remat", False, True, "losses and gradients"),
        ("lora.merge", False, True, "losses and gradients"),
        ("reward.videoscore.attention", "xla", "cudnn", "scores"),
        ("data.text_cache", "", "/cache", "encodings of prompts"),
        ("mesh.fsdp", 1, 2, "videos, scores and losses"),
        ("reward.offload", False, True, ""),
        ("checkpoint.keep", 3, 1, ""),
        ("log.tensorboard", True, False, ""),
        ("eval.on_alarm", "warn", "stop", ""),
        ("profile.steps", "", "3:5", ""),
    ],
)
def test_how_a_run_is_computed_may_differ_on_resume_and_it_is_said_what_rounds(tmp_path, key, was, value, numbers):
    open_workdir(tmp_path, with_value(key, was)).close()
    with open_workdir(tmp_path, with_value(key, value)) as workdir:
        assert workdir.note == "" if not numbers else f"{key} was {was!r} and is {value!r} ({numbers})" in workdir.note
    with open_workdir(tmp_path, with_value(key, value)) as workdir:
        assert workdir.resumed and workdir.note == ""


def test_a_run_that_goes_on_with_other_devices_says_so(tmp_path):
    open_workdir(tmp_path, {"seed": 1}).close()
    file = tmp_path / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"devices": ["cpu 0", "cpu 1"]}))
    with open_workdir(tmp_path, {"seed": 1}) as workdir:
        assert "there were 2 devices and are 1 (videos, scores and losses)" in workdir.note
    file.write_text("{")
    with open_workdir(tmp_path, {"seed": 1}) as workdir:
        assert workdir.resumed and workdir.note == ""


def model_folder(path, text="one"):
    (path / "unet").mkdir(parents=True)
    (path / "unet" / "config.json").write_text(json.dumps({"layers": text}))
    (path / "README.md").write_text(text * 3)
    return path


def opened(tmp_path, **values):
    config = {**CONFIG, "model": {"path": ""}, "reward": {"scorers": ""}, "data": {"prompts": "shapes:train"}}
    for key, value in values.items():
        section, _, name = key.partition("_")
        config[section] = {**config[section], name: str(value)}
    with open_workdir(tmp_path / "run", config, contents_of(config)) as workdir:
        return workdir


def test_a_model_that_was_moved_is_the_same_and_another_one_at_its_path_is_not(tmp_path):
    model = model_folder(tmp_path / "m")
    opened(tmp_path, model_path=model)
    model.rename(tmp_path / "moved")
    assert opened(tmp_path, model_path=tmp_path / "moved").resumed
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["path"] == f"{tmp_path}/moved"
    (tmp_path / "moved" / "unet" / "config.json").write_text(json.dumps({"layers": "two"}))
    with pytest.raises(UserError, match=r"model\.path: .*moved holds something else than .*moved did when"):
        opened(tmp_path, model_path=tmp_path / "moved")


def test_scorers_and_prompt_files_are_known_by_their_content_too(tmp_path):
    scorer, prompts = model_folder(tmp_path / "s"), tmp_path / "p.txt"
    prompts.write_text("a\n")
    opened(tmp_path, reward_scorers=f"shapes, {scorer}", data_prompts=prompts)
    scorer.rename(tmp_path / "t")
    prompts.rename(tmp_path / "q.txt")
    opened(tmp_path, reward_scorers=f"shapes,{tmp_path}/t", data_prompts=tmp_path / "q.txt")
    with pytest.raises(UserError, match=r"reward\.scorers: "):
        opened(tmp_path, reward_scorers=f"{tmp_path}/t", data_prompts=tmp_path / "q.txt")
    (tmp_path / "q.txt").write_text("b\n")
    with pytest.raises(UserError, match=r"data\.prompts: .*q\.txt holds something else"):
        opened(tmp_path, reward_scorers=f"shapes,{tmp_path}/t", data_prompts=tmp_path / "q.txt")


def test_a_name_in_place_of_a_folder_is_another_model(tmp_path):
    opened(tmp_path, model_path=model_folder(tmp_path / "m"))
    with pytest.raises(UserError, match=r"model\.path was .* and is 'shapes'"):
        opened(tmp_path, model_path="shapes")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.steps", 6, r"train\.steps was 12 and is 6"),
        ("seed", 1, "seed was 0 and is 1"),
        ("optimizer.learning_rate", 2e-4, r"optimizer\.learning_rate was 0\.0001 and is 0\.0002"),
        ("optimizer.new", 2, r"optimizer\.new was None and is 2"),
    ],
)
def test_another_config_is_refused_with_old_and_new_value_and_nothing_is_written(tmp_path, key, value, message):
    open_workdir(tmp_path, CONFIG).close()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message):
        open_workdir(tmp_path, with_value(key, value))
    before[".lock"] = (tmp_path / ".lock").read_bytes()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    open_workdir(tmp_path, CONFIG).close()


def test_a_directory_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "export").mkdir()
    with pytest.raises(UserError, match=r"has a export and no config\.json"):
        open_workdir(tmp_path, CONFIG)
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; give a directory"):
        open_workdir(tmp_path / "file", CONFIG)
    with pytest.raises(UserError, match="is a file; give a directory"):
        open_workdir(tmp_path / "file" / "below", CONFIG)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("name", "kind"), [("report.html", "file"), ("checkpoints", "folder"), ("export", "folder")])
def test_what_stands_where_the_run_writes_at_its_end_is_named_at_its_start(tmp_path, name, kind):
    open_workdir(tmp_path, CONFIG).close()
    (tmp_path / name).mkdir() if kind == "file" else (tmp_path / name).symlink_to("nowhere")
    for refuse in (open_workdir, completed_steps):
        with pytest.raises(UserError, match=f"{name} is no {kind}, and the run writes one there"):
            refuse(tmp_path, CONFIG)


def test_a_broken_config_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        open_workdir(tmp_path, CONFIG)


def test_no_permission_is_a_user_error(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    # Root may write anywhere, so the attempt is made by a child that is nobody.
    done = run_program("open_locked_workdir.py", tmp_path)
    assert "no permission to write" in done.stdout, done.stderr


def test_one_run_holds_the_directory_until_its_process_dies_by_any_death(tmp_path):
    holder = start_program("hold_workdir.py", tmp_path, json.dumps(CONFIG))
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"is in use by another run \(process {holder.pid}\)"):
        open_workdir(tmp_path, CONFIG)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    open_workdir(tmp_path, CONFIG).close()
