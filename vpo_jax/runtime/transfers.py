"""Copies from the host to the devices inside a run's loop: explicit ones, and a guard against all others.

A weight that is left in host memory by mistake is copied at every call, which only the step's time would show.
"""

import contextlib
from typing import Any

import jax

Tree = Any


def guarded() -> contextlib.AbstractContextManager[None]:
    """Inside, JAX refuses every copy from the host to the devices but by `put` or `jax.device_put`.

    It is off in runs of several processes: there jitted functions take numpy arrays, which are the same everywhere.
    """
    return jax.transfer_guard_host_to_device("disallow") if jax.process_count() == 1 else contextlib.nullcontext()


def allowed() -> contextlib.AbstractContextManager[None]:
    """Inside, copies are allowed again: for evaluations, scorers and checkpoints, whose copies cost little."""
    return jax.transfer_guard_host_to_device("allow")


def put(tree: Tree) -> Tree:
    """What a jitted function takes of the host's numbers and arrays, copied explicitly."""
    return jax.device_put(tree) if jax.process_count() == 1 else tree
