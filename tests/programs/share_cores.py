"""Prints how many devices JAX has where a CPU should be as many as the first argument says, and its settings."""

import os
import sys

import jax

from vpo_jax.runtime.backend import share_cores

share_cores(int(sys.argv[1]))
before = jax.device_count()
share_cores(before + 1)  # too late: nothing happens
ahead = jax.config.read("jax_cpu_enable_async_dispatch")
print(before, jax.device_count(), "ahead" if ahead else "in_turn", os.environ["XLA_FLAGS"])
