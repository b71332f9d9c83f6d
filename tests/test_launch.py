"""The launch scripts, in a checkout of their own whose requirements are empty and whose main only says its flags."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"])
REQUIREMENTS = ("requirements.txt", "requirements-test.txt", "requirements-cuda12.txt", "requirements-tpu.txt")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    root = tmp_path_factory.mktemp("a checkout")
    shutil.copytree(ROOT / "launch", root / "launch")
    shutil.copytree(ROOT / "configs", root / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in REQUIREMENTS:
        (root / name).write_text("# nothing\n")
    (root / "vpo_jax").mkdir()
    (root / "vpo_jax" / "main.py").write_text("import os, sys; print(os.getcwd(), sys.prefix, *sys.argv[1:], sep='|')")
    return root


def run(script: Path, *arguments: str, cwd: Path, path: Path | None = None, python: Path | None = None):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "PYTHON"))}
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    if python is not None:
        environment["PYTHON"] = str(python)
    return subprocess.run(
        ["bash", script, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def fake(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")
def test_local_runs_main_from_anywhere_with_paths_seen_from_there(checkout, tmp_path):
    done = run(checkout / "launch" / "local.sh", "--config.train.steps=3", "--workdir=w", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = f"--config={checkout}/configs/vpo.py"
    assert done.stdout == f"{tmp_path}|{checkout}/.venv|{config}|--config.train.steps=3|--workdir=w\n"
    assert "installing requirements.txt" in done.stderr


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")
def test_a_second_run_starts_at_once_and_says_nothing(checkout, tmp_path):
    run(checkout / "launch" / "local.sh", cwd=tmp_path)
    began = time.monotonic()
    done = run(checkout / "launch" / "local.sh", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert time.monotonic() - began < 3


def test_a_gpu_brings_its_own_requirements(checkout, tmp_path):
    path = fake(tmp_path / "bin", "nvidia-smi", "echo 'GPU 0: NVIDIA H100'")
    done = run(checkout / "launch" / "local.sh", cwd=tmp_path, path=path)
    assert done.returncode == 0 and "installing requirements-cuda12.txt" in done.stderr


@pytest.mark.skipif(any(Path("/dev").glob("accel*")), reason="this machine has a TPU")
def test_nvidia_smi_without_a_gpu_is_a_cpu(checkout, tmp_path):
    path = fake(tmp_path / "bin", "nvidia-smi", "echo 'no driver' >&2; exit 9")
    done = run(checkout / "launch" / "local.sh", cwd=tmp_path, path=path)
    assert done.returncode == 0 and "cuda" not in done.stderr


def test_requirements_that_cannot_be_installed_are_told_and_tried_again(checkout, tmp_path):
    path = fake(tmp_path / "bin", "nvidia-smi", "echo 'GPU 0: NVIDIA H100'")
    (checkout / "requirements-cuda12.txt").write_text("./no/such/folder\n")
    try:
        for _ in range(2):
            done = run(checkout / "launch" / "local.sh", cwd=tmp_path, path=path)
            assert done.returncode == 1 and done.stdout == ""
            assert "error: requirements-cuda12.txt could not be installed" in done.stderr
    finally:
        (checkout / "requirements-cuda12.txt").write_text("# nothing\n")


def test_no_python_is_an_error_with_the_fix(checkout, tmp_path):
    root = tmp_path / "other"
    shutil.copytree(checkout / "launch", root / "launch")
    for name in REQUIREMENTS:
        (root / name).write_text("")
    path = tmp_path / "bin"
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        fake(path, name, "exit 1")
    done = run(root / "launch" / "local.sh", cwd=tmp_path, path=path)
    assert done.returncode == 2 and "no Python 3.11 or newer found; install one, or set PYTHON=" in done.stderr


def test_a_python_that_is_too_old_is_an_error_with_the_fix(checkout, tmp_path):
    old = fake(tmp_path / "bin", "old", "echo 3.9; exit 1") / "old"
    done = run(checkout / "launch" / "local.sh", cwd=tmp_path, python=old)
    assert done.returncode == 2 and f"error: PYTHON={old} is not Python 3.11 or newer" in done.stderr


@pytest.mark.slow
def test_another_python_has_an_environment_of_its_own_and_the_first_one_stays(checkout, tmp_path):
    """The other Python says that it is 3.98, makes an environment like any other, and runs in it."""
    assert run(checkout / "launch" / "local.sh", cwd=tmp_path).returncode == 0
    stamp = checkout / ".venv" / "requirements.stamp"
    before = stamp.stat().st_mtime_ns
    other = fake(tmp_path / "bin", "other", f'[ "$1" = -c ] && echo 3.98 || exec {sys.executable} "$@"') / "other"
    done = run(checkout / "launch" / "local.sh", cwd=tmp_path, python=other)
    assert done.returncode == 0, done.stderr
    assert f"|{checkout}/.venv-3.98|" in done.stdout and stamp.stat().st_mtime_ns == before
    same = run(checkout / "launch" / "local.sh", cwd=tmp_path, python=Path(sys.executable))
    assert same.returncode == 0 and f"|{checkout}/.venv|" in same.stdout and same.stderr == ""


def test_the_tests_ask_for_lint_format_and_types_first(checkout, tmp_path):
    done = run(checkout / "launch" / "test.sh", "--dry_run", "-m", "quick", cwd=tmp_path)
    programs = [line.split(" -m ", 1)[1].split()[0] for line in done.stdout.splitlines() if " -m " in line]
    assert done.returncode == 0 and programs == ["ruff", "ruff", "mypy", "pytest"]
    assert done.stdout.rstrip().endswith("-m quick")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_ci_calls_test_sh():
    assert "launch/test.sh" in (ROOT / ".ci" / "run").read_text() and os.access(ROOT / ".ci" / "run", os.X_OK)
