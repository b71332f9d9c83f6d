"""What the benchmarks of full-size parts share."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vpo_jax.planning.chips import CHIPS, Chip
from vpo_jax.runtime.errors import UserError


def chip_of(device: jax.Device) -> Chip | None:
    """What its maker publishes of a device; None where the planner does not know it."""
    return next((chip for name, chip in CHIPS.items() if name in device.device_kind.lower()), None)


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """The result and its seconds."""
    began = time.perf_counter()
    value = jax.block_until_ready(function(*args))
    return value, time.perf_counter() - began


def random_weights(shapes: Any) -> Any:
    """Arrays of those shapes, with a variance that keeps what goes through them of order one."""

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
