"""Runs of the main job in processes of their own, and what they leave behind."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from vpo_jax.runtime import backend

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "tests" / "programs"


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def weights(workdir):
    return (workdir / "export" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def start(job, workdir, *more):
    command = [sys.executable, "-m", "vpo_jax.main", *job, f"--workdir={workdir}", *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, workdir, step):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (workdir / "checkpoints" / str(step)).is_dir():
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step}: {process.communicate()}")


def rewrite_steps(workdir, steps):
    """Makes a run that was asked for more steps one of `steps`, which a resume would refuse."""
    path = workdir / "config.json"
    if path.exists():
        config = json.loads(path.read_text())
        config["train"]["steps"] = steps
        path.write_text(json.dumps(config))


def without_time(line):
    return {name: value for name, value in line.items() if not name.startswith("time/")}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def joining(port, number, processes):
    """Environment of process `number` of a run of so many; of a single one nothing."""
    if processes == 1:
        return {}
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(number),
    }


def ends(started):
    """(exit code, stdout, stderr) of each."""
    try:
        said = [process.communicate(timeout=600) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def on_devices(count):
    """This environment with so many CPU devices."""
    flags = (os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={count}", backend._PATIENT)
    return os.environ | {"XLA_FLAGS": " ".join(flags).lstrip()}


def start_program(name, *arguments, devices=1, **environment):
    """tests/programs/NAME in a process of its own, on so many CPU devices and with more environment variables."""
    env = on_devices(devices) | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, str(PROGRAMS / name), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_program(name, *arguments, devices=1, timeout=600, **environment):
    """The same, waited for: a CompletedProcess with its output as text, whatever its exit code."""
    process = start_program(name, *arguments, devices=devices, **environment)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
