"""Compiled functions with what a planner has to know of them: which arguments are parameters and which are batches."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.trees import bytes_of

Tree = Any
# How an argument lies on a mesh: by the family's rules, along its first dimension (scalars whole), or whole.
Role = Literal["parameters", "batch", "whole"]


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled function of a step. Training calls it; a plan lowers it for hardware that is not attached.

    Attributes:
      name: as in plans and benchmarks.
      function: what `jax.jit` returns.
      arguments: batch -> the function's arguments for it, as `jax.ShapeDtypeStruct`s.
      roles: of each argument.
      mesh: which of a job's meshes it is computed on: "update", "rollout" or "score".
      batch: rows that one step gives it: prompts, videos.
      microbatch: rows at a time; 0 = all.
      microbatch_key: config key that sets it, "" where none does.
      unit: rows that belong together: a batch is a multiple of it.
      shared: rows that share work where a device holds them all: a prompt's candidates, for which it is read once.
      calls: in a step.
      passes: over the weights in a call, backward ones too.
      trains: whether gradients of the trainable parameters are summed over devices.
    """

    name: str
    function: Any
    arguments: Callable[[int], tuple[Tree, ...]]
    roles: tuple[Role, ...]
    mesh: Literal["update", "rollout", "score"]
    batch: int
    _: dataclasses.KW_ONLY
    microbatch: int = 0
    microbatch_key: str = ""
    unit: int = 1
    shared: int = 1
    calls: int = 1
    passes: int = 1
    trains: bool = False

    @property
    def weights(self) -> int:
        """Bytes of the parameters that one pass reads."""
        arguments = zip(self.arguments(self.unit), self.roles, strict=True)
        return sum(bytes_of(tree) for tree, role in arguments if role == "parameters")


def choose_programs(programs: Sequence[Program], names: str) -> list[Program]:
    """The programs with these comma-separated names; all where there are none.

    Raises:
      UserError: a name that no program has, with those that there are.
    """
    known = [program.name for program in programs]
    wanted = [name.strip() for name in names.split(",") if name.strip()] or known
    if unknown := set(wanted) - set(known):
        raise UserError(f"--stages: {', '.join(sorted(unknown))}: no such stage; the job has {', '.join(known)}")
    return [program for program in programs if program.name in wanted]


def abstract(tree: Tree) -> Tree:
    """The tree's shapes and dtypes: arrays become `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def abstract_rows(tree: Tree, rows: int) -> Tree:
    """Shapes of `rows` of what the tree holds one of: [...] becomes [rows, ...]."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype), tree)
