"""Several processes as one run: joining it, and communication between its processes.

One process is the main one: it alone prints, and writes every file that Orbax does not write. In a run of one process
nothing is communicated.
"""

import itertools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from vpo_jax.runtime.backend import has_tpu
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.stored import Stored, put
from vpo_jax.runtime.types import Tree

_GIVEN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# What a scheduler sets in each of several tasks; JAX finds the rest in its other variables.
_SCHEDULERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def join_processes(environment: Mapping[str, str] | None = None) -> None:
    """Joins this process to the run that the environment describes, before JAX computes anything.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID where they are given; else what SLURM, OpenMPI or
    a TPU slice says; else this process is a run of its own.

    Raises:
      UserError: some of the three variables are missing or no numbers, or the others cannot be reached.
    """
    environment = os.environ if environment is None else environment
    if jax.distributed.is_initialized():
        return
    given = [name for name in _GIVEN if environment.get(name)]
    if given:
        missing = [name for name in _GIVEN if name not in given]
        if missing:
            raise UserError(f"{missing[0]}: not set, though {given[0]} is; set all of {', '.join(_GIVEN)}, or none")
        number, this = (_whole(environment, name) for name in _GIVEN[1:])
        if not this < number:
            raise UserError(f"JAX_PROCESS_ID: {this} is not below JAX_NUM_PROCESSES={number}; count from 0")
        address = environment["JAX_COORDINATOR_ADDRESS"]
        _join(address, lambda: jax.distributed.initialize(address, number, this))
    elif any(_whole(environment, name, 1) > 1 for name in _SCHEDULERS):
        _join("the scheduler's first task", jax.distributed.initialize)
    elif has_tpu() and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu"):
        try:
            jax.distributed.initialize()
        except ValueError as error:  # a TPU without a slice's description: one host by itself
            print(f"warning: one process only: {str(error).partition(chr(10))[0]}", file=sys.stderr)


def _join(whom: str, initialize: Callable[[], None]) -> None:
    # On CPUs JAX starts independent programs in any order, and programs that communicate can then block each other.
    # This switch of JAX prevents that for processes of one device; for more devices, see `move`.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        initialize()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{whom}: this process could not join the run ({reason}); are all of them started?") from error


def _whole(environment: Mapping[str, str], name: str, absent: int = 0) -> int:
    text = environment.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f"{name}: {text!r} is not a whole number")
    return int(text) if text else absent


def is_main() -> bool:
    """Whether this process writes files and prints for the run."""
    return jax.process_index() == 0


def largest(values: np.ndarray) -> np.ndarray:
    """The elementwise largest of the processes' arrays of one shape, the same in all of them; all have to call it."""
    if jax.process_count() == 1:
        return values
    return np.max(multihost_utils.process_allgather(values), axis=0)


def agree(value: int) -> int:
    """The largest of the processes' values, the same in all of them; all have to call it."""
    return int(largest(np.array(value, np.int32)))


def main_first(work: Callable[[], None]) -> None:
    """Runs `work` in the main process alone; all go on once it is done, or stop with a UserError where it failed."""
    failure: BaseException | None = None
    if is_main():
        try:
            work()
        except UserError as error:
            failure = error
    if agree(failure is not None):
        raise failure or UserError("the main process stopped; its message says why")


def share(values: np.ndarray) -> np.ndarray:
    """This process's rows of an array that all of them hold: every process_count-th from its own number on."""
    return values[jax.process_index() :: jax.process_count()]


def unshare(rows: np.ndarray, number: int) -> np.ndarray:
    """The whole array of `number` rows from each process's `share` of them, the same in all of them."""
    processes = jax.process_count()
    if processes == 1:
        return rows
    most = -(-number // processes)
    padded = np.zeros((most, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    gathered = np.asarray(multihost_utils.process_allgather(padded))  # [processes, most, ...]
    return gathered.swapaxes(0, 1).reshape(-1, *rows.shape[1:])[:number]


def place(tree: Tree, shardings: Tree) -> Tree:
    """Arrays that every process holds whole or has on disk, as global arrays; each copies its own shards alone."""
    if jax.process_count() == 1:
        return put(tree, shardings)

    def one(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        if isinstance(x, Stored):
            return x.placed(sharding)
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(one, tree, shardings)


def free(placed: Tree, source: Tree) -> None:
    """Frees the arrays that `place` made of `source`; those that lay on the devices before are left alone."""
    for leaf, original in zip(jax.tree.leaves(placed), jax.tree.leaves(source), strict=True):
        if not isinstance(original, jax.Array):
            leaf.delete()


def move(tree: Tree, shardings: Tree) -> Tree:
    """Global arrays with other shardings over the same devices; an array that has its sharding already is not copied.

    One program moves all arrays: on CPUs, several small programs can block each other.
    """
    leaves, structure = jax.tree.flatten(tree)
    targets = jax.tree.leaves(shardings)
    travels = [not x.sharding.is_equivalent_to(to, x.ndim) for x, to in zip(leaves, targets, strict=True)]
    there = iter(())
    if any(travels):
        reshard = jax.jit(_same, out_shardings=tuple(itertools.compress(targets, travels)))
        there = iter(reshard(tuple(itertools.compress(leaves, travels))))
    moved = [
        next(there)
        if travel
        else jax.make_array_from_single_device_arrays(x.shape, to, [shard.data for shard in x.addressable_shards])
        for x, to, travel in zip(leaves, targets, travels, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def _same(tree: Tree) -> Tree:
    return tree


def fetch(tree: Tree) -> Tree:
    """Global arrays as numpy arrays, whole, in every process; all have to call it.

    What is sharded over processes is gathered one array after the other: a device holds one whole array at a time, and
    has one program started (`backend.settled`).
    """

    def one(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            assert isinstance(x.sharding, NamedSharding)
            x = jax.device_get(jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec())))
        return x

    return jax.device_get(jax.tree.map(one, tree))
