"""The algorithms by name: one line each."""

from collections.abc import Mapping

from vpo_jax.algorithms.dpo import fields as dpo
from vpo_jax.algorithms.dpo.algorithm import DPO
from vpo_jax.algorithms.protocol import Entry

ALGORITHMS: Mapping[str, Entry] = {"dpo": Entry(DPO, dpo.FIELDS, dpo.check)}
