"""What JAX runs on, and where it keeps compiled programs."""

import math
import os
import shutil
import subprocess
from pathlib import Path

import jax


def keep_compiled_programs() -> Path:
    """Turns on JAX's persistent compilation cache, before anything is compiled; returns its directory.

    JAX_COMPILATION_CACHE_DIR chooses another one than ~/.cache/vpo_jax/jax.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vpo_jax" / "jax"
    directory = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # With jax's defaults nothing that compiles in under a second is stored.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory


_DEVICES = "--xla_force_host_platform_device_count"
# A device that waits 40 s for another one aborts the process, also where the machine slept or had no core to give.
_PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=86400"
_PATIENT = (0, 10), (0, 11)  # versions of JAX that know it; an unknown flag aborts the process


def divide_cores(*batches: int) -> int:
    """Makes JAX see the CPU as several devices, as many as there are cores that divide every batch; their number.

    A clip or a pair is a device's own work, so two devices keep two cores busier than one device's threads do: a
    step of the embedded job takes 39 s in place of 58 s. Nothing happens where JAX has computed already, or where
    XLA_FLAGS or JAX_NUM_CPU_DEVICES say how many (1 then). Beside an accelerator these devices lie idle.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    together = math.gcd(*batches)  # a batch of 0 is divided by everything
    devices = max(n for n in range(1, _cores() + 1) if together % n == 0)
    if devices == 1 or _DEVICES in flags or "JAX_NUM_CPU_DEVICES" in os.environ:
        return 1
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # the devices are there already
        return 1
    if jax.__version_info__[:2] in _PATIENT and _PATIENCE.partition("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_PATIENCE}".strip()
    return devices


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def unused_accelerator() -> str:
    """What to tell a person whose GPU or TPU lies idle because JAX runs on the CPU; "" where all is well."""
    if jax.default_backend() != "cpu":
        return ""
    if _has_nvidia():
        what, requirements = "an NVIDIA GPU", "requirements-cuda12.txt"
    elif has_tpu():
        what, requirements = "a TPU", "requirements-tpu.txt"
    else:
        return ""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return f"this machine has {what} and JAX uses the CPU: JAX_PLATFORMS={platforms}; unset it to use {what}"
    return f"this machine has {what} and JAX uses the CPU; pip install -r {requirements} to use {what}"


def _has_nvidia() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        listed = subprocess.run([command, "-L"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and b"GPU" in listed.stdout


def has_tpu() -> bool:
    """Whether this machine has a TPU, whatever JAX runs on."""
    if any(Path("/dev").glob("accel[0-9]*")):
        return True
    # From v5e on the chips are bound to vfio; 0x1ae0 is Google.
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    return any(Path("/dev/vfio").glob("[0-9]*")) and any("0x1ae0" in vendor.read_text() for vendor in vendors)
