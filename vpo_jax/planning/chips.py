"""Accelerators with their published numbers, and slices of them by name."""

import dataclasses
import math
import re

from vpo_jax.runtime.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
      name: as in a topology.
      flops: peak dense bfloat16 FLOP/s.
      memory: bytes of HBM.
      bandwidth: HBM bytes/s.
      interconnect: bytes/s to the other chips, all links and both directions together.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    interconnect: float


# TPUs: cloud.google.com/tpu/docs/v4 and so on, "system architecture". TPU7x: half of a chip, which is two devices.
# GPUs: NVIDIA's data sheets of the SXM modules, without sparsity; the interconnect is NVLink.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB, 1.228e12, 0.30e12),
        Chip("v5e", 197e12, 16 * GIB, 0.819e12, 0.20e12),
        Chip("v5p", 459e12, 95 * GIB, 2.765e12, 0.60e12),
        Chip("v6e", 918e12, 32 * GIB, 1.638e12, 0.448e12),
        Chip("tpu7x", 1153.5e12, 96 * GIB, 3.69e12, 0.60e12),
        Chip("a100", 312e12, 80e9, 2.039e12, 0.60e12),
        Chip("h100", 989e12, 80e9, 3.35e12, 0.90e12),
        Chip("h200", 989e12, 141e9, 4.8e12, 0.90e12),
        Chip("b200", 2250e12, 180e9, 8.0e12, 1.80e12),
    )
}
TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
# Usable share of the memory: XLA, the runtime and fragmentation take the rest.
USABLE = 0.92
_GPUS_A_NODE = 8
_NETWORK = 50e9  # bytes/s a GPU between nodes: one 400 Gbit/s adapter each


@dataclasses.dataclass(frozen=True)
class Topology:
    """`count` devices of one kind, as `name`."""

    name: str
    chip: Chip
    count: int

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu can compile for it."""
        return self.chip.name in TPUS

    @property
    def interconnect(self) -> float:
        """Bytes/s of a device to the others; GPUs of several nodes are as fast as their network."""
        crosses = not self.is_tpu and self.count > _GPUS_A_NODE
        return _NETWORK if crosses else self.chip.interconnect


def parse_topology(text: str) -> Topology:
    """The topology of "v5e:4x4", "v5p:4x4x4" or "gpu:8xh100".

    Raises:
      UserError: another form or an unknown kind.
    """
    kind, _, shape = text.partition(":")
    gpus = re.fullmatch(r"([1-9]\d{0,5})x(\w+)", shape) if kind == "gpu" else None
    if gpus and gpus[2] in CHIPS and gpus[2] not in TPUS:
        return Topology(text, CHIPS[gpus[2]], int(gpus[1]))
    if kind in TPUS and re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}", shape):
        count = math.prod(int(side) for side in shape.split("x"))
        return Topology(text, CHIPS[kind], count * (2 if kind == "tpu7x" else 1))
    gpu_names = ", ".join(name for name in CHIPS if name not in TPUS)
    raise UserError(
        f"--topology: {text!r} is not known; give a TPU slice, as v5e:4x4 ({', '.join(TPUS)}), or GPUs by number and"
        f" kind, as gpu:8xh100 ({gpu_names})"
    )
