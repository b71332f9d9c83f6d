import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.running import lines, rewrite_steps, run_program, start, wait_for_step, weights, without_time
from vpo_jax import main
from vpo_jax.pipeline import load_pipeline
from vpo_jax.runtime import backend, cli
from vpo_jax.runtime.trees import bytes_of

ROOT = Path(__file__).resolve().parents[1]
DIMENSIONS = (
    "visual_quality",
    "temporal_consistency",
    "dynamic_degree",
    "text_to_video_alignment",
    "factual_consistency",
)


def test_a_run_leaves_what_people_look_at(finished):
    workdir, shown = finished
    names = {path.name for path in workdir.iterdir()}
    wanted = {"config.json", "environment.json", "metrics.jsonl", "checkpoints", "samples", "report.html", "export"}
    assert wanted <= names
    assert list((workdir / "samples").rglob("*.webp")) and list(workdir.glob("events.out.tfevents.*"))
    assert [line["step"] for line in lines(workdir)] == [1, 2]
    config = json.loads((workdir / "config.json").read_text())
    assert config["lora"]["rank"] == 2 and config["optimizer"]["learning_rate"] == 1e-4
    assert all(dimension in shown for dimension in DIMENSIONS) and "win rate" in shown


def test_prompts_are_escaped_in_the_report(finished):
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    assert "\U0001f534" in page


def test_the_printed_lines_load_the_export_in_diffusers(finished):
    pytest.importorskip("torch", reason="diffusers needs it")
    shown = finished[1]
    code = [line.strip() for line in shown.splitlines() if line.startswith("    ")][-3:]
    assert code[0] == "from diffusers import TextToVideoSDPipeline"
    scope: dict = {}
    exec("\n".join(code), scope)
    assert np.asarray(scope["video"]).shape[-4:] == (4, 8, 8, 3)


def test_the_export_is_the_tuned_model(finished, model_folder):
    import vpo_jax

    base, tuned = vpo_jax.load_pipeline(model_folder), vpo_jax.load_pipeline(finished[0] / "export")
    same = [np.array_equal(a, b) for a, b in zip(*(leaves(pipe) for pipe in (base, tuned)), strict=True)]
    assert not all(same) and any(same), "the adapters' layers changed and the others did not"


def leaves(pipeline):
    import jax

    return jax.tree.leaves(pipeline.params)


def test_the_comparison_has_the_steps_and_guidance_of_eval_and_the_rollouts_their_own(finished):
    workdir, _ = finished
    config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    evaluation = json.loads((workdir / "evaluation.json").read_text(encoding="utf-8"))
    assert config["rollout"]["num_inference_steps"] == 2 and config["rollout"]["guidance_scale"] == 2.0
    assert evaluation["settings"]["num_inference_steps"] == 3
    assert evaluation["settings"]["guidance_scale"] == 1.5


def test_a_second_run_says_that_it_is_complete_and_changes_nothing(finished, job, capsys):
    workdir = finished[0]
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    main.main([*job, f"--workdir={workdir}"])
    assert "complete: 2 steps are done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_killed_interrupted_and_continued_the_run_ends_as_if_nothing_had_been(finished, job, tmp_path):
    steps = "--config.train.steps=60"
    workdir = tmp_path / "run"
    for step, signum, code in ((1, signal.SIGKILL, -9), (3, signal.SIGTERM, 143), (5, signal.SIGINT, 130)):
        process = start(job, workdir, steps)
        wait_for_step(process, workdir, step)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code, errors
        assert signum == signal.SIGKILL or "the same command continues" in errors
    reached = lines(workdir)[-1]["step"]
    assert 5 <= reached < 60
    # It may be continued for longer, and is cut short here: the rest is what the two runs have in common.
    uninterrupted = tmp_path / "other"
    last = reached + 1
    for directory in (workdir, uninterrupted):
        rewrite_steps(directory, last)
        assert start(job, directory, f"--config.train.steps={last}").wait(timeout=300) == 0
    assert weights(workdir) == weights(uninterrupted)
    assert [without_time(line) for line in lines(workdir)] == [without_time(line) for line in lines(uninterrupted)]


@pytest.mark.slow
def test_more_steps_go_on_where_the_run_ended(finished, job, tmp_path):
    workdir = Path(shutil.copytree(finished[0], tmp_path / "run"))
    main.main([*job, f"--workdir={workdir}", "--config.train.steps=3"])
    assert [line["step"] for line in lines(workdir)] == [1, 2, 3]
    assert weights(workdir) != weights(finished[0])


def test_help_lists_every_field(capsys):
    with pytest.raises(SystemExit) as done:
        main.main(["--help"])
    shown = capsys.readouterr().out
    assert done.value.code == 0
    for key, _ in cli.flatten_config(cli.load_config("configs/vpo.py")):
        assert f"--config.{key} " in shown
    assert "--workdir" in shown


@pytest.mark.slow
def test_a_comparison_that_does_not_fit_leaves_the_export_and_says_how_to_go_on(finished, job, tmp_path, monkeypatch):
    workdir = Path(shutil.copytree(finished[0], tmp_path / "run"))
    (workdir / "complete").unlink()
    on_devices = lambda: sum(array.nbytes for array in jax.live_arrays())  # noqa: E731
    before, grown = on_devices(), []

    def full(base, tuned, prompts, scorers, *arguments, **more):
        grown.append(on_devices() - before - sum(bytes_of(scorer.params) for scorer in scorers))
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(main, "compare", full)
        with pytest.raises(
            SystemExit, match=r"^stopped: the closing comparison .* --tuned=\S+export --batch=1"
        ) as done:
            main.command([*job, f"--workdir={workdir}"])
    assert isinstance(done.value.code, str)  # which Python prints, and exits with 1
    assert (workdir / "export" / "model_index.json").is_file() and not (workdir / "complete").exists()
    denoiser = bytes_of(load_pipeline(workdir / "export").params["unet"])
    assert grown[0] < denoiser / 2, "training's arrays lie on the devices beside the comparison's"


def test_a_comparison_takes_as_many_clips_a_device_as_a_rollout(monkeypatch):
    assert main.videos_at_a_time(0) == 16 and main.videos_at_a_time(8) == 8
    monkeypatch.setattr(jax, "device_count", lambda: 32)
    monkeypatch.setattr(jax, "local_device_count", lambda: 8)
    assert [main.videos_at_a_time(microbatch) for microbatch in (0, 64, 32, 2)] == [16, 16, 8, 1]


def test_the_default_workdir_is_named_by_config_and_preset(monkeypatch):
    asked = []
    monkeypatch.setattr(main, "run", lambda config, workdir: asked.append(str(workdir)))
    main.main([])
    main.main(["--config=configs/vpo.py:tiny"])
    main.main(["--workdir=here"])
    assert asked == ["runs/vpo", "runs/vpo-tiny", "here"]


@pytest.mark.parametrize(
    ("nvidia", "tpu", "platforms", "said"),
    [
        (True, False, "", "an NVIDIA GPU and JAX uses the CPU; pip install -r requirements-cuda12.txt"),
        (False, True, "", "a TPU and JAX uses the CPU; pip install -r requirements-tpu.txt"),
        (True, False, "cpu", "JAX_PLATFORMS=cpu; unset it to use an NVIDIA GPU"),
        (False, False, "", None),
    ],
)
def test_an_idle_accelerator_is_told(monkeypatch, nvidia, tpu, platforms, said):
    monkeypatch.setattr(backend, "_has_nvidia", lambda: nvidia)
    monkeypatch.setattr(backend, "has_tpu", lambda: tpu)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert said in backend.unused_accelerator() if said else backend.unused_accelerator() == ""


def test_a_non_finite_step_ends_with_exit_code_1(monkeypatch):
    from vpo_jax.training.run import NonFinite

    def stop(config, workdir):
        raise NonFinite("step 3: the loss was not finite")

    monkeypatch.setattr(main, "run", stop)
    with pytest.raises(SystemExit) as done:
        cli.run(main.command, [])
    assert done.value.code == "stopped: step 3: the loss was not finite", "a text exits with 1"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc alone")
def test_memory_that_was_freed_is_not_asked_for_again():
    """Page faults of a large buffer that is made and freed ten times: those of one, where it was kept."""
    faults = {mode: int(run_program("page_faults.py", mode, GLIBC_TUNABLES="").stdout) for mode in ("keep", "free")}
    assert faults["keep"] < 0.1 * faults["free"]


@pytest.mark.parametrize(
    ("flags", "number", "devices"),
    [
        ("", {}, 3),
        ("--xla_force_host_platform_device_count=2", {}, 2),
        ("", {"JAX_NUM_CPU_DEVICES": "4"}, 4),
    ],
)
def test_a_cpu_is_as_many_devices_as_are_asked_for_unless_the_environment_says_a_number(flags, number, devices):
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests/programs/share_cores.py"), "3"],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)} | number,
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.split() == [*[str(devices)] * 2, "in_turn", *flags.split(), backend._PATIENT]


@pytest.mark.parametrize(("several", "apart", "shares"), [(False, 0, True), (True, 0, False), (False, 1, False)])
def test_one_process_whose_scorers_have_no_devices_of_their_own_shares_the_cores(
    monkeypatch, job, tmp_path, several, apart, shares
):
    class Begun(Exception):
        """What follows is another test's."""

    def begin(*_):
        raise Begun

    shared = []
    monkeypatch.setattr(main, "share_cores", shared.append)
    monkeypatch.setattr(main, "join_processes", lambda: None)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: several)
    monkeypatch.setattr(main, "local_folder", begin)
    with pytest.raises(Begun):
        apart = f"--config.reward.devices={apart}", f"--config.preference.max_pair_age={apart}"
        main.main([*job, *apart, f"--workdir={tmp_path}"])
    assert bool(shared) == shares


def test_the_seconds_of_a_step_are_those_of_its_stages(finished):
    stages = ("rollout", "score", "update")
    for line in lines(finished[0]):
        spent = [line[f"time/{name}"] for name in stages]
        assert min(spent) > 0.0
        assert sum(spent) <= line["time/step"] * (1 + 1e-6)


def test_a_machine_with_an_accelerator_keeps_its_devices(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(backend, "_has_nvidia", lambda: True)
    monkeypatch.setattr(jax.config, "update", lambda *_: pytest.fail("a setting of the CPU changed"))
    backend.share_cores(8)


def test_the_compilation_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    import jax

    before = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert backend.keep_compiled_programs() == tmp_path
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert backend.keep_compiled_programs() == tmp_path / "home" / "vpo_jax" / "jax"
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("platforms", "gpu", "flags", "expected"),
    [
        (None, True, None, backend._REPEATABLE),
        ("cuda,cpu", True, "--xla_a=1", f"--xla_a=1 {backend._REPEATABLE}"),
        (None, True, "--xla_gpu_deterministic_ops=true", "--xla_gpu_deterministic_ops=true"),
        (None, True, backend._REPEATABLE.replace("true", "false"), backend._REPEATABLE.replace("true", "false")),
        (None, False, None, None),
        ("cpu", True, None, None),
        ("tpu,cpu", True, None, None),
    ],
)
def test_programs_for_a_gpu_give_the_same_bits_each_time(monkeypatch, platforms, gpu, flags, expected):
    for name, value in (("JAX_PLATFORMS", platforms), ("XLA_FLAGS", flags)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(backend, "_has_nvidia", lambda: gpu)
    for _ in range(2):
        backend.keep_compiled_programs()
        assert os.environ.get("XLA_FLAGS") == expected


def test_xla_knows_the_flag_for_a_gpu():
    environment = os.environ | {"XLA_FLAGS": backend._REPEATABLE}
    code = "import jax; assert jax.numpy.ones(3).sum() == 3"
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
