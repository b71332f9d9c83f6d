"""FLOPs of the primitives that make products; all others count as none."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vpo_jax.models.fused_attention import BACKWARD, FORWARD

Shape = Sequence[int]


def flops_of(primitive: str, params: Mapping[str, Any], inputs: Sequence[Shape], outputs: Sequence[Shape]) -> float:
    """FLOPs of a primitive of these shapes.

    Attention in one kernel has two products forward, 4 B H Q K D, and five backward, since it computes the scores
    again: 2.5 times as much (FlashAttention-2, arXiv 2307.08691, section 4.1). Its scores are never stored.
    """
    if primitive == "dot_general":
        (summed, _), _ = params["dimension_numbers"]
        return 2.0 * math.prod(outputs[0]) * math.prod(inputs[0][axis] for axis in summed)
    if primitive == "conv_general_dilated":
        numbers, kernel = params["dimension_numbers"], inputs[1]
        flops = 2.0 * math.prod(outputs[0]) * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        # Zeros of a dilated input are not multiplied.
        return flops / math.prod(params["lhs_dilation"] or (1,))
    if primitive in (FORWARD, BACKWARD):
        query, key = inputs[0], inputs[1]
        return (4.0 if primitive == FORWARD else 10.0) * math.prod(query) * key[1]
    return 0.0
