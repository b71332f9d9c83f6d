"""What wrong input gets: one line that names the field and the fix, exit code 2, and nothing written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.running import ROOT, on_devices
from vpo_jax import main
from vpo_jax.runtime import cli

UNET = Path("unet", "diffusion_pytorch_model.safetensors")


@pytest.fixture
def refusal(job, tmp_path, capsys):
    """What a run with more flags is refused with; nothing may be left in its workdir."""

    def refuse(*flags, workdir=None):
        directory = Path(workdir or tmp_path / "never")
        before = sorted(directory.rglob("*"))
        with pytest.raises(SystemExit) as done:
            cli.run(main.command, [*job, f"--workdir={directory}", *flags])
        said = capsys.readouterr().err
        assert done.value.code == 2, said
        assert said.startswith("error: ") and said.count("\n") == 1
        assert sorted(directory.rglob("*")) == before and (workdir or not directory.exists())
        return said

    return refuse


@pytest.fixture
def model(model_folder, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def test_a_missing_model_folder(refusal, tmp_path):
    assert "nowhere: no such folder" in refusal(f"--config.model.path={tmp_path}/nowhere")


def test_a_folder_that_is_no_pipeline(refusal, tmp_path):
    (tmp_path / "folder").mkdir()
    assert "model_index.json" in refusal(f"--config.model.path={tmp_path}/folder")


def test_truncated_safetensors(refusal, model):
    data = (model / UNET).read_bytes()
    (model / UNET).write_bytes(data[: len(data) // 2])
    assert "damaged or cut short" in refusal(f"--config.model.path={model}")


def test_missing_and_extra_tensors_are_listed(refusal, model):
    state = load_file(model / UNET)
    state["conv_out.wait"] = state.pop("conv_out.weight")
    save_file(state, model / UNET)
    said = refusal(f"--config.model.path={model}")
    assert "conv_out.weight" in said and "conv_out.wait" in said


def test_wrong_shapes(refusal, model):
    state = load_file(model / UNET)
    state["conv_in.bias"] = np.zeros(7, np.float32)
    save_file(state, model / UNET)
    said = refusal(f"--config.model.path={model}")
    assert "conv_in.bias" in said and "7" in said


def test_a_pickle_checkpoint(refusal, model):
    (model / UNET).rename((model / UNET).with_suffix(".bin"))
    assert "tools/pickle_to_safetensors.py" in refusal(f"--config.model.path={model}")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.train.stepz=3", "train.stepz: unknown config key; did you mean train.steps?"),
        ("--config.train.steps=1e3", "train.steps: '1e3' is not a whole number"),
        ("--config.train.steps=0", "train.steps: 0 is not a whole number from 1 up"),
        ("--config.preference.beta=high", "preference.beta: 'high' is not a number"),
        ("--config.rollout.candidates=1", "rollout.candidates: 1 leaves nothing to prefer; give 2 or more"),
        ("--config.mesh.data=64", "mesh.data: the mesh data=64 x fsdp=1 x context=1 x tensor=1 needs 64 devices"),
        ("--config=configs/vpo.py:tinny", "there is no preset 'tinny'"),
        ("--config=nowhere.py", "there is no file nowhere.py"),
        ("--worksdir=x", "--worksdir: unknown flag; did you mean --workdir?"),
        ("--config.reward.scorers=nobody", "'nobody' is no scorer"),
        ("--config.reward.scorers=judge", "judge is for evaluation only"),
        ("--config.reward.scorers=classical", "classical is for evaluation only"),
        ("--config.reward.scorers=videoscore", "reward.videoscore.path: is empty, but reward.scorers names videoscore"),
        ("--config.held_out.scorers=classical", "8x8 pixels are too few for the classical measures"),
        ("--config.held_out.scorers=videoreward", "reward.videoreward.path: is empty, but held_out.scorers names"),
        ("--config.reward.scorers=no_such_module:sharp", "reward.scorers: no_such_module:sharp needs a module"),
        ("--config.data.prompts=shapes:tunes", "no split 'tunes'"),
        ("--config.rollout.height=9", "height: 9 is not a positive multiple of 2"),
        ("--config.rollout.sampler=Dice", "Dice"),
        ("--config.eval.num_inference_steps=2000", "eval.num_inference_steps: 2000 must be between 1 and 1000"),
        ("--config.reward.weights=beauty=2", "beauty"),
        ("--config.lora.targets=nothing", "lora.targets"),
    ],
)
def test_flags_and_fields(refusal, flag, message):
    assert message in refusal(flag)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no file"), (b"\n \n", "holds no prompt"), (b"a \xff circle", "not UTF-8")],
    ids=["missing", "empty", "not UTF-8"],
)
@pytest.mark.parametrize("field", ["data.prompts", "data.held_out"])
def test_a_prompts_file(refusal, tmp_path, field, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    said = refusal(f"--config.{field}={path}")
    assert message in said and said.startswith(f"error: {field}: ")


def test_a_workdir_of_another_config(refusal, finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    said = refusal("--config.optimizer.learning_rate=0.5", "--config.seed=3", workdir=workdir)
    assert "optimizer.learning_rate was 0.0001 and is 0.5, seed was 0 and is 3" in said


def test_a_workdir_that_is_a_file(job, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as done:
        cli.run(main.command, [*job, f"--workdir={tmp_path}/file"])
    assert done.value.code == 2 and "is a file; give a directory" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_a_batch_that_the_mesh_does_not_divide(job, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vpo_jax.main", *job, f"--workdir={tmp_path}/run"],
        env=on_devices(8),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "run").exists()
    assert done.stderr.startswith("error: train.prompts_per_step: 2 is not a multiple of 8")


def small_disk(folder, megabytes):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")


def test_no_permission_to_write(job, tmp_path, refusal):
    small_disk(tmp_path / "disk", 1)
    try:
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        said = refusal(workdir=tmp_path / "disk")
        assert "no permission to write" in said or "read-only disk" in said
    finally:
        subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_in_mid_run_and_the_run_continues_once_there_is_room(job, finished, tmp_path, capsys):
    small_disk(tmp_path / "disk", 64)
    try:
        workdir = tmp_path / "disk" / "run"
        ballast = tmp_path / "disk" / "ballast"
        checkpoint = sum(f.stat().st_size for f in (finished[0] / "checkpoints" / "2").rglob("*") if f.is_file())
        # Room for one checkpoint and a half beside the small files of a run.
        with ballast.open("wb") as file:
            file.write(bytes(64 * 2**20 - checkpoint * 3 // 2 - 150_000))
        with pytest.raises(SystemExit) as done:
            cli.run(main.command, [*job, f"--workdir={workdir}", "--config.train.steps=3"])
        said = capsys.readouterr().err
        assert done.value.code == 2 and "full" in said, said
        assert not (workdir / "export").exists() or not (workdir / "complete").exists()
        ballast.unlink()
        main.main([*job, f"--workdir={workdir}", "--config.train.steps=3"])
        steps = [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3] and (workdir / "complete").exists()
    finally:
        subprocess.run(["umount", "-l", tmp_path / "disk"], check=True)
