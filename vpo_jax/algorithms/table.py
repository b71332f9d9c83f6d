"""The algorithms by name: one line each."""

from collections.abc import Callable, Mapping

from vpo_jax.algorithms.dpo.algorithm import DPO
from vpo_jax.algorithms.protocol import Algorithm, Setting

ALGORITHMS: Mapping[str, Callable[[Setting], Algorithm]] = {"dpo": DPO}
