"""Type aliases for arrays, keys, trees and dtypes."""

from typing import Any, TypeAlias

import jax
import numpy as np
import numpy.typing as npt
from jax.typing import DTypeLike

Array: TypeAlias = jax.Array
Key: TypeAlias = jax.Array  # made by jax.random.key, or a batch of such
Tree: TypeAlias = Any  # a pytree of arrays; jax gives pytrees no type
DType: TypeAlias = DTypeLike
Table: TypeAlias = npt.NDArray[Any]  # a table on the host
FloatTable: TypeAlias = npt.NDArray[np.float32]
