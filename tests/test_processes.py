"""The main job on several devices and as several processes, which start, stop and go on together."""

import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.running import ROOT, ends, free_port, joining, lines, on_devices, rewrite_steps, wait_for_step

PROMPTS = 4


def start_together(job, workdir, steps, processes, devices=1, flags=()):
    """Starts the same run as so many processes of so many fake devices each."""
    port, started = free_port(), []
    more = [
        f"--config.train.steps={steps}",
        f"--config.train.prompts_per_step={PROMPTS}",
        f"--workdir={workdir}",
        *flags,
    ]
    for number in range(processes):
        environment = on_devices(devices) | joining(port, number, processes)
        command = [sys.executable, "-m", "vpo_jax.main", *job, *more]
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return started


@pytest.mark.slow
def test_two_processes_stop_together_and_four_go_on_to_what_one_process_makes(job, tmp_path):
    workdir, alone, cache = tmp_path / "run", tmp_path / "alone", f"--config.data.text_cache={tmp_path / 'text'}"
    # Weights sharded over both processes to update and to score, and gathered from both to sample.
    roles = "--config.mesh.fsdp=4", "--config.mesh.rollout=data=4", "--config.mesh.score=fsdp=2,tensor=2"
    two = start_together(job, workdir, 60, 2, devices=2, flags=(*roles, cache))
    wait_for_step(two[0], workdir, 1)
    two[1].send_signal(signal.SIGTERM)  # a preemption notice that one host alone gets
    ended = ends(two)
    assert [code for code, _, _ in ended] == [143, 143], ended
    done = len(lines(workdir))
    assert 1 <= done < 60 and (workdir / "checkpoints" / str(done)).is_dir()

    last = done + 1
    rewrite_steps(workdir, last)
    ended = ends(start_together(job, workdir, last, 4, flags=(cache,)))
    assert [code for code, _, _ in ended] == [0] * 4, ended
    # Each process's encoder is the same, however it is sharded: the second run reads what the first has encoded.
    assert len(list((tmp_path / "text").iterdir())) == 1
    # One of them speaks; what the CPU's collectives print of themselves is not ours.
    said = ["".join(line for line in stdout.splitlines() if "[Gloo]" not in line) for _, stdout, _ in ended]
    assert "win rate" in said[0] and not any(said[1:])
    assert f"continuing from step {done}" in ended[0][2]

    ((code, _, stderr),) = ends(start_together(job, alone, last, 1, devices=4))
    assert code == 0, stderr
    # The same prompts in the same order: other ones would change the rewards by far more than rounding does.
    ours, theirs = lines(workdir), lines(alone)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, last + 1))
    for a, b in zip(ours, theirs, strict=True):
        for name, value in a.items():
            if name.startswith(("reward/", "pair/")):
                assert value == pytest.approx(b[name], abs=1e-4), (a["step"], name)
    # Sums are split differently between two, four and one process: float32 rounding, through AdamW's division.
    mine, whole = (load_file(w / "export/unet/diffusion_pytorch_model.safetensors") for w in (workdir, alone))
    for name, tensor in whole.items():
        np.testing.assert_allclose(mine[name], tensor, atol=2e-5, err_msg=name)
    assert (workdir / "evaluation.json").is_file() and (workdir / "report.html").is_file()


@pytest.mark.slow
def test_devices_that_share_a_cpu_end_a_step_of_many_updates(job, tmp_path):
    flags = "--config.mesh.fsdp=2", "--config.train.updates_per_step=60"
    ((code, _, stderr),) = ends(start_together(job, tmp_path / "run", 1, 1, devices=2, flags=flags))
    assert code == 0, stderr
