"""Helpers of the benchmarks of full-size parts."""

import functools
import importlib.metadata
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.checkpoints.keys import torch_tensors
from vpo_jax.planning.chips import CHIPS, Chip
from vpo_jax.runtime import cli
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import flatten, is_stacked

_NOISE = 4_194_301  # numbers, repeated: a prime, so that rows differ


def chip_of(device: jax.Device) -> Chip | None:
    """The published numbers of a device; None where the planner does not know it."""
    return next((chip for name, chip in CHIPS.items() if name in device.device_kind.lower()), None)


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """The result and its seconds."""
    began = time.perf_counter()
    value = jax.block_until_ready(function(*args))
    return value, time.perf_counter() - began


def repeated(repeats: int, function: Callable[..., Any], *args: Any) -> dict[str, Any]:
    """Of so many calls: {"seconds": the median, "all_seconds": each}."""
    seconds = [timed(function, *args)[1] for _ in range(repeats)]
    return {"seconds": statistics.median(seconds), "all_seconds": seconds}


def peak_bytes() -> int | None:
    """The most memory of the first device that this process has used; None where the device does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def random_weights(shapes: Any) -> Any:
    """Arrays of those shapes, with a variance that keeps activations of order one."""

    def one(key: jax.Array, shape: tuple[int, ...], dtype: Any, inputs: int) -> jax.Array:
        return (jax.random.normal(key, shape, dtype) / np.sqrt(inputs)).astype(dtype)

    fill = jax.jit(one, static_argnums=(1, 2, 3))
    leaves = flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    filled = []
    for key, (path, leaf) in zip(keys, leaves.items(), strict=True):
        layer = leaf.shape[1:] if is_stacked(path) else leaf.shape
        filled.append(fill(key, leaf.shape, leaf.dtype, int(np.prod(layer[:-1]))))
    return jax.tree.unflatten(jax.tree.structure(shapes), filled)


def run_peer(benchmark: str, case: dict[str, Any]) -> dict[str, Any]:
    """What `torch_peer` of that benchmark's file measures, in a process of its own: neither sees the other's memory."""
    command = [sys.executable, benchmark, f"--only_peer={json.dumps(case)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"--peer: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_random(folder: Path, stem: str, shapes: Mapping[str, Any], dtype: str) -> None:
    """Weights of those shapes, with a variance that keeps activations of order one."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).standard_normal(_NOISE, np.float32)

    @functools.cache
    def scaled(scale: float) -> np.ndarray:
        return (noise * scale).astype(jnp.dtype(dtype))

    def one(leaf: str, shape: tuple[int, ...]) -> np.ndarray:  # [out, in, *space] of a kernel
        if leaf == "scale":
            return np.ones(shape, jnp.dtype(dtype))
        return np.resize(scaled(int(np.prod(shape[1:])) ** -0.5 if leaf == "kernel" else 0.02), shape)

    state = {
        key: one(path.rpartition("/")[2], shape)
        for path, leaf in flatten(shapes).items()
        for key, shape in torch_tensors(path, leaf.shape).items()
    }
    io.write_weights(folder, stem, state)


def versions() -> dict[str, str | None]:
    """Of what a time depends on; None of what is not there."""

    def of(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def says(*command: str) -> str | None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20, cwd=cli.ROOT)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip().partition("\n")[0] or None

    cuda = re.search(r"cuda (\d+)", jax.devices()[0].client.platform_version)
    packages = ("jax", "jaxlib", "flax", "torch", "transformers", "diffusers")
    return {
        "commit": says("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"),
        "python": platform.python_version(),
        **{package: of(package) for package in packages},
        "cuda": cuda and f"{int(cuda[1]) // 1000}.{int(cuda[1]) % 1000 // 10}",  # 13000 is 13.0
        "driver": says("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }
