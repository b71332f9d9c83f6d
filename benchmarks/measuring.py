"""Helpers of the benchmarks of full-size parts."""

import functools
import json
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
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import flatten

_NOISE = 4_194_301  # numbers, repeated: a prime, so that rows differ


def chip_of(device: jax.Device) -> Chip | None:
    """The published numbers of a device; None where the planner does not know it."""
    return next((chip for name, chip in CHIPS.items() if name in device.device_kind.lower()), None)


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """The result and its seconds."""
    began = time.perf_counter()
    value = jax.block_until_ready(function(*args))
    return value, time.perf_counter() - began


def random_weights(shapes: Any) -> Any:
    """Arrays of those shapes, with a variance that keeps activations of order one."""

    def one(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        inputs = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
        return (jax.random.normal(key, shape, dtype) / np.sqrt(inputs)).astype(dtype)

    leaves, structure = jax.tree.flatten(shapes)
    fill = jax.jit(one, static_argnums=(1, 2))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    filled = [fill(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, filled)


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
