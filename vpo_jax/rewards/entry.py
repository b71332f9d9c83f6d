"""What a scorer's folder provides, as one record: `SCORER` of its `__init__.py`."""

import dataclasses
from collections.abc import Callable
from typing import Any

from vpo_jax.rewards.protocol import Reward


@dataclasses.dataclass(frozen=True)
class Entry:
    """One scorer. Either its name alone is enough (`make`), or its weights lie in a folder that the user names.

    Attributes:
      make: () -> Reward, where the name alone is enough.
      load: (folder, name or None[, options]) -> Reward, where weights can lie in a folder.
      classes: what such a folder's config.json calls itself: `_class_name`, or the first of `architectures`.
      marker: a file that such a folder has, if it may have no config.json.
      options: the dataclass of `reward.NAME` in a config, see `rewards.options`; None where the config has none.
      abstract: (name, options) -> the published Reward with shapes for `params`, for plans without the weights.
    """

    make: Callable[[], Reward] | None = None
    load: Callable[..., Reward] | None = None
    classes: tuple[str, ...] = ()
    marker: str = ""
    options: type[Any] | None = None
    abstract: Callable[[str, Any], Reward] | None = None
