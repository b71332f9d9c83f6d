"""Prints the page faults of a large buffer that is made and freed ten times; `keep` keeps freed memory."""

import resource
import sys

import jax  # noqa: F401  loaded first, as in every command
import numpy as np

from vpo_jax.runtime.backend import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
np.ones(2**22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(2**22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
