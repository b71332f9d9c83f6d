"""Fields of a config: a type, a condition on the value, and the condition in words."""

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vpo_jax.runtime.errors import UserError

# Values by their full key: "preference.beta" -> 500.0.
Values = Mapping[str, Any]


class Field(NamedTuple):
    """What one key of a config may hold.

    Attributes:
      kind: type; a float may be given as a whole number.
      holds: whether a value of that type is allowed.
      words: what is allowed, after "is not".
    """

    kind: type
    holds: Callable[[Any], bool]
    words: str

    def check(self, key: str, value: Any) -> None:
        """Raises UserError that names the key."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        right = is_number if self.kind is float else type(value) is self.kind
        # A comparison, because math.isfinite raises for a whole number that is too large for a float.
        finite = self.kind is not float or (right and abs(value) <= sys.float_info.max)
        if not right or not finite or not self.holds(value):
            raise UserError(f"{key}: {value!r} is not {self.words}")


def whole(low: int, extra: str = "", bits: int = 31) -> Field:
    """A whole number from `low` to below 2**bits."""
    return Field(int, lambda x: low <= x < 2**bits, f"a whole number from {low} up{extra}, below 2**{bits}")


def number(low: float, high: float = math.inf, extra: str = "") -> Field:
    """A number from `low` to `high`, both included."""
    upper = f" to {high:g}" if high < math.inf else " up"
    return Field(float, lambda x: low <= x <= high, f"a number from {low:g}{upper}{extra}")


def above(low: float) -> Field:
    """A number above `low`."""
    return Field(float, lambda x: x > low, f"a number above {low:g}")


def one_of(*values: str) -> Field:
    """One of these words."""
    return Field(str, lambda x: x in values, f"one of {', '.join(values)}")


def named(what: str) -> Field:
    """Text that may not be empty; `what` says what it names."""
    return Field(str, lambda x: bool(x.strip()), what)


FLAG = Field(bool, lambda x: True, "true or false")
TEXT = Field(str, lambda x: True, "text")
POSITIVE = above(0)
DECAY = Field(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
