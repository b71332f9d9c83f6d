"""Views of a source of prompts that reads one when it is asked for."""

from collections.abc import Callable, Sequence
from typing import overload

import numpy as np


class Prompts(Sequence[str]):
    """Prompts at some places of a source; a slice is another such view.

    Attributes:
      read: place -> prompt.
      places: int64 [number of prompts], whatever `read` takes.
    """

    def __init__(self, read: Callable[[int], str], places: np.ndarray) -> None:
        self.read, self.places = read, places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> "Prompts": ...

    def __getitem__(self, index: int | slice) -> "str | Prompts":
        if isinstance(index, slice):
            return Prompts(self.read, self.places[index])
        return self.read(int(self.places[index]))
