"""What users of this field met in other projects, from the command line to the end."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.running import ROOT, lines, weights
from vpo_jax import evaluate, main, score
from vpo_jax.pipeline import load_pipeline
from vpo_jax.rewards.loading import load_scorer
from vpo_jax.runtime import cli
from vpo_jax.runtime.errors import UserError
from vpo_jax.shapes import world


def exit_code(command, *argv) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.run(command, [str(word) for word in argv])
    return int(caught.value.code)


def with_value(job, key, value):
    return [*(word for word in job if not word.startswith(f"--config.{key}=")), f"--config.{key}={value}"]


@pytest.mark.slow
def test_a_moved_model_and_another_way_to_compute_go_on_in_a_workdir_below_a_tilde(
    finished, job, model_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.copytree(model_folder, tmp_path / "moved")
    flags = with_value(job, "model.path", "~/moved")
    for key, value in {
        "train.microbatch": 1,
        "rollout.microbatch": 1,
        "train.remat": True,
        "reward.offload": True,
        "data.text_cache": "~/cache",
        "checkpoint.keep": 1,
        "log.samples": 1,
    }.items():
        flags = with_value(flags, key, value)
    main.main([*flags, "--workdir=~/run", "--config.train.steps=3"])
    shown = capsys.readouterr().out
    assert "some numbers may round differently" in shown and "train.microbatch was" in shown
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]
    assert weights(tmp_path / "run") != weights(finished[0]) and list((tmp_path / "cache").iterdir())
    assert not (ROOT / "~").exists() and not Path("~").exists()


def test_another_model_at_the_same_path_is_refused(finished, job, model_folder, tmp_path, capsys):
    model, workdir = tmp_path / "m", tmp_path / "run"
    shutil.copytree(model_folder, model)
    shutil.copytree(finished[0], workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["model"]["path"] = str(model)
    (workdir / "config.json").write_text(json.dumps(config))
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    for place in range(8 + size, len(data), 64):
        data[place] ^= 1
    file.write_bytes(data)
    flags = [*with_value(job, "model.path", model), f"--workdir={workdir}", "--config.train.steps=3"]
    assert exit_code(main.main, *flags) == 2
    assert "model.path: " in (said := capsys.readouterr().err) and "holds something else" in said


def test_a_foreign_file_in_export_is_named_before_anything_is_loaded(job, tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "export").mkdir()
    (tmp_path / "run" / "export" / "thesis.txt").write_text("years")
    monkeypatch.setattr(main, "completed_steps", lambda *_: None)
    monkeypatch.setattr(main, "load_pipeline", lambda *_: pytest.fail("it was loaded"))
    assert exit_code(main.main, *job, f"--workdir={tmp_path}/run") == 2
    assert "holds thesis.txt" in capsys.readouterr().err


@pytest.mark.parametrize("command", [main.main, evaluate.main, score.main])
def test_a_tilde_is_expanded_in_every_command(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = {
        main.main: ("--config=configs/vpo.py:tiny", "--config.model.path=~/none", "--workdir=~/w"),
        evaluate.main: ("--base=~/none", "--tuned=~/none", "--output=~/out"),
        score.main: ("--scorer=judge", "--videos=~/*.none", "--output=~/s.json"),
    }[command]
    assert exit_code(command, *flags) == 2
    said = capsys.readouterr().err
    assert str(tmp_path) in said or command is score.main
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_videos_are_scored_with_the_prompts_of_their_names(tmp_path):
    indices = world.caption_indices("held_out")[:3]
    videos = np.asarray(world.to_uint8(world.render_videos(jax.random.key(0), indices, 0.0).frames))
    captions = [world.make_caption(world.ALL_ATTRIBUTES[index]) for index in indices]
    folder = tmp_path / "clips[1]"
    folder.mkdir()
    for name, video in zip(("10", "2", "1"), videos, strict=True):
        np.save(folder / f"{name}.npy", video)
    (tmp_path / "p.json").write_text(json.dumps(dict(zip(("10.mp4", "2.mp4", "1.mp4"), captions, strict=True))))
    (tmp_path / "p.txt").write_text("\n".join(reversed(captions)))
    for prompts in ("p.json", "p.txt"):
        flags = ("--scorer=judge", f"--videos={folder}/*.npy", f"--prompts={tmp_path}/{prompts}")
        assert exit_code(score.main, *flags, f"--output={tmp_path}/s.json") == 0
        rows = json.loads((tmp_path / "s.json").read_text())
        assert [Path(row["video"]).name for row in rows] == ["1.npy", "2.npy", "10.npy"]
        assert [row["prompt"] for row in rows] == captions[::-1]
        expected = load_scorer("judge")(videos[::-1], captions[::-1])["overall"]
        np.testing.assert_allclose([row["overall"] for row in rows], expected, rtol=1e-6)


@pytest.mark.slow
def test_every_bit_of_a_seed_changes_the_video_and_a_seed_out_of_range_is_refused(model_folder):
    pipeline = load_pipeline(model_folder)
    low, high = (pipeline("a", num_inference_steps=1, seed=seed) for seed in (5, 2**32 + 5))
    assert (low != high).any()
    for seed in (-1, 2**64):
        with pytest.raises(UserError, match=rf"seed: {seed} is not a whole number from 0 to 2\*\*64 - 1"):
            pipeline("a", num_inference_steps=1, seed=seed)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused_in_commands(tmp_path, capsys, seed):
    assert exit_code(evaluate.main, "--base=b", "--tuned=t", f"--output={tmp_path}/o", f"--seed={seed}") == 2
    assert f"--seed: {seed} is not" in capsys.readouterr().err
    for key in ("seed", "eval.seed"):
        flags = ("--config=configs/vpo.py:tiny", f"--config.{key}={seed}", f"--workdir={tmp_path}/w")
        assert exit_code(main.main, *flags) == 2
        assert f"{key}: {seed} is not" in capsys.readouterr().err


def hostile(kind: str, folder: Path) -> None:
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if kind == "shard outside":
        unet.rename(folder.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": {"conv_in.weight": "../../outside.safetensors"}}
        unet.with_name(f"{unet.name}.index.json").write_text(json.dumps(index))
    elif kind == "no channels":
        config = json.loads((folder / "unet" / "config.json").read_text())
        (folder / "unet" / "config.json").write_text(json.dumps({**config, "block_out_channels": [0]}))
    else:
        (folder / "model_index.json").write_text("[" * 200_000 + "]" * 200_000)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shard outside", "no channels", "deep JSON"])
def test_a_hostile_model_ends_a_run_in_one_line_and_leaves_nothing(model_folder, tmp_path, kind):
    shutil.copytree(model_folder, tmp_path / "m")
    hostile(kind, tmp_path / "m")
    flags = ["--config=configs/vpo.py:tiny", f"--config.model.path={tmp_path}/m", f"--workdir={tmp_path}/w"]
    done = subprocess.run(
        [sys.executable, "-m", "vpo_jax.main", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "w").exists()
