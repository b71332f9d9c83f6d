"""Which prompt stands in slot s of step k: a function of nothing but the seed, so any run finds its place again."""

import dataclasses
import functools

import jax
import numpy as np

from vpo_jax.runtime.keys import stream_key


@dataclasses.dataclass(frozen=True)
class PromptIndex:
    """A stateless order of prompts: every epoch is a permutation drawn from (seed, epoch).

    Attributes:
      size: number of prompts.
      prompts_per_step: slots of a step, over all processes.
      seed: the run's seed.
      shuffle: False keeps the list's own order in every epoch.
    """

    size: int
    prompts_per_step: int
    seed: int
    shuffle: bool = True

    def __call__(self, step: int) -> np.ndarray:
        """Indices of the prompts of a step, int64 [prompts_per_step]; an epoch may end within a step."""
        places = step * self.prompts_per_step + np.arange(self.prompts_per_step)
        epochs, offsets = np.divmod(places, self.size)
        if not self.shuffle:
            return offsets
        orders = {int(epoch): _permutation(self.seed, int(epoch), self.size) for epoch in np.unique(epochs)}
        return np.array([orders[epoch][offset] for epoch, offset in zip(epochs.tolist(), offsets, strict=True)])


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.asarray(jax.random.permutation(stream_key(seed, "data", epoch), size))
