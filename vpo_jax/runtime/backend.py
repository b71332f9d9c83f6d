"""What JAX runs on, and where it keeps compiled programs."""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import jax

T = TypeVar("T")

# Without this flag two runs on one GPU differ in the last digit of the first gradient. XLA aborts on a flag that it
# does not know; jax 0.10 to 0.12 know this one.
_REPEATABLE = "--xla_gpu_exclude_nondeterministic_ops=true"
# Devices of a CPU wait for each other, by default 40 s, after which XLA aborts; on a busy machine one may take longer.
# jaxlib 0.10 and 0.12 know this flag.
_PATIENT = "--xla_cpu_collective_call_terminate_timeout_seconds=3600"


def keep_compiled_programs() -> Path:
    """Turns on JAX's persistent compilation cache, before JAX computes anything; returns its directory.

    JAX_COMPILATION_CACHE_DIR chooses another one than ~/.cache/vpo_jax/jax. On an NVIDIA GPU only
    deterministic kernels are used, unless XLA_FLAGS mentions deterministic_ops. XLA chooses among them by timing, and
    the cache keeps the choice.
    """
    flags, platforms = os.environ.get("XLA_FLAGS", ""), os.environ.get("JAX_PLATFORMS", "cuda").split(",")
    if "deterministic_ops" not in flags and {"cuda", "gpu", ""} & set(platforms) and _has_nvidia():
        os.environ["XLA_FLAGS"] = f"{flags} {_REPEATABLE}".lstrip()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vpo_jax" / "jax"
    directory = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # With jax's defaults nothing that compiles in under a second is stored.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return directory


# The parameters of mallopt(3), in malloc.h of glibc.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Lets this process keep the memory that a program on the CPU frees, for the next one; before JAX computes.

    XLA allocates its buffers with malloc. glibc's malloc returns large buffers to the system, which fills them with
    zeros at the next allocation: an update of the embedded model took up to 3.9 s instead of 1.5 s. The function does
    nothing where there is an accelerator or another C library.
    """
    if sys.platform != "linux" or not on_cpu():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_ARENA_MAX, 1)  # the arenas of other threads map anything large by themselves
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)


def on_cpu() -> bool:
    """Whether JAX will compute on the CPU; before it computes anything."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return platforms == "cpu" or not (platforms or _has_nvidia() or has_tpu())


def count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_LARGE = 1e9  # bytes


def copies_on_cores(weights: int) -> int:
    """How many copies of models of so many bytes, each on a device of its own, this machine's cores are good for."""
    return count_cores() if weights <= _LARGE else 1


def share_cores(devices: int) -> None:
    """Makes JAX see a CPU as so many devices, which share its cores, and run one program at a time on them.

    Before JAX computes anything. XLA divides an operation among cores with loss, and a batch among devices with little;
    programs that run beside each other take each other's caches (docs/tuning.md has the seconds). Nothing happens where
    there is an accelerator or JAX has its devices. XLA_FLAGS and JAX_NUM_CPU_DEVICES may say another number.
    """
    if not on_cpu():
        return
    flags = os.environ.get("XLA_FLAGS", "")
    said = "xla_force_host_platform_device_count" in flags
    if "xla_cpu_collective_call_terminate_timeout" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_PATIENT}".lstrip()
    with contextlib.suppress(RuntimeError):  # JAX has its devices
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        if devices > 1 and not said and "JAX_NUM_CPU_DEVICES" not in os.environ:
            jax.config.update("jax_num_cpu_devices", devices)


def settled(tree: T) -> T:
    """`tree`; on a CPU, once it is computed.

    XLA holds 32 programs at most for each device of a CPU. A host that starts more of them while devices wait for each
    other inside one blocks them for ever (jaxlib 0.10.2), and on a CPU running ahead gains nothing.
    """
    return jax.block_until_ready(tree) if jax.default_backend() == "cpu" else tree


def unused_accelerator() -> str:
    """A warning for a machine whose GPU or TPU is idle because JAX runs on the CPU; "" where there is none."""
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
