"""A person's own reward: an object or a plain Python function in a module that they name as "module:attribute".

A function gets whole videos and a prompt for each of them, on the host, and gives a score of each for every dimension,
higher is better:

    def my_reward(videos, prompts):       # uint8 [B, F, H, W, 3], list of B str
        return {"brightness": videos.mean((1, 2, 3, 4))}

    my_reward.dimensions = ("brightness",)
    my_reward.ranges = ((0.0, 255.0),)    # lowest and highest value that each is meant to take
    my_reward.trains = True               # False: it is used for evaluation only

All three attributes may be missing. Without `dimensions` the function is called once at loading, on six small videos,
and what it gives is taken; without `ranges` they are what it gives there (a hundredth of a range is the least
deviation that counts, so the order of magnitude is enough); without `trains` it trains. A dimension called
"dynamic_degree" feeds the motion gate.

It runs in a thread of its own, so that one that hangs can be told: what torch keeps for a thread (`torch.no_grad()`)
belongs inside the function. With reward.timeout=0 it runs in the main thread.

An object follows `rewards.protocol.Reward`, so its `score` has a row of `prepare` for each prompt and perhaps several
videos to it; with `jittable` true its `score` is compiled with the rest and has no time-out.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from vpo_jax.rewards.custom.origin import Origin, described
from vpo_jax.rewards.custom.reward import CustomReward, FunctionReward, checked_answer

TIMEOUT = 600.0  # seconds; the default of reward.timeout
_PROTOCOL = ("name", "dimensions", "ranges", "trains", "jittable", "params", "frame_indices", "prepare", "score")
_SEPARATORS = "/,="  # of reward.weights


def load(source: str, field: str, timeout: float = TIMEOUT) -> CustomReward:
    """The reward that stands in a module as "module:attribute"; the module is imported, as Python finds it.

    Raises:
      UserError: names `field`, the module or attribute, and the fix.
    """
    origin = Origin(source, field)
    attribute = source.partition(":")[2]
    found = _imported(origin)
    if inspect.isclass(found):
        raise origin.wrong(f"is a class; give an object of it, as {attribute.lower()} = {attribute}()")
    if hasattr(found, "score"):
        missing = [name for name in _PROTOCOL if not hasattr(found, name)]
        if missing:
            raise origin.wrong(f"has no {', '.join(missing)}; give it all that vpo_jax.rewards.protocol.Reward lists")
        inner, name, dimensions, ranges = found, found.name, found.dimensions, found.ranges
    elif callable(found):
        inner, ranges = _from_function(origin, found, timeout)
        name, dimensions = attribute, inner.dimensions
    else:
        raise origin.wrong(f"is of type {type(found).__name__}; give a function or an object with score(...)")
    if not isinstance(name, str) or not name or set(name) & set(_SEPARATORS):
        raise origin.wrong(f"has the name {name!r}; give a word without any of {_SEPARATORS}")
    dimensions = _checked_names(origin, dimensions)
    return CustomReward(origin, inner, timeout, name, dimensions, _checked_ranges(origin, ranges, dimensions))


def probe_videos() -> tuple[np.ndarray, list[str]]:
    """Six videos and prompts on which a function shows its dimensions and ranges: uint8 [6, 8, 64, 64, 3].

    Black, white, noise that stays, noise that changes, and a slope that stays and one that moves.
    """
    rng = np.random.default_rng(0)
    shape = (8, 64, 64, 3)
    slope = np.broadcast_to(np.arange(64)[None, None, :, None] * 4, shape)
    moving = np.stack([np.roll(frame, 4 * i, axis=1) for i, frame in enumerate(slope)])
    noise = rng.integers(0, 256, shape)
    still = np.broadcast_to(noise[:1], shape)
    videos = [np.zeros(shape), np.full(shape, 255), still, noise, slope, moving]
    return np.stack(videos).astype(np.uint8), ["a red ball that rolls"] * len(videos)


def _imported(origin: Origin) -> Any:
    module_name, _, attribute = origin.source.partition(":")
    if not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        raise origin.wrong("is no MODULE:ATTRIBUTE; write my_rewards:sharp for sharp in my_rewards.py")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and module_name.startswith(f"{error.name}"):
            raise origin.wrong(
                f"needs a module {error.name!r}, and there is none; start the command where {module_name}.py lies, or "
                "add its folder to PYTHONPATH"
            ) from None
        raise origin.wrong(f"cannot be imported: {described(error, origin.source)}; correct it") from error
    if not hasattr(module, attribute):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise origin.wrong(f"is missing: {module_name} has {', '.join(known) or 'no function'}; name what is there")
    return getattr(module, attribute)


def _from_function(origin: Origin, function: Callable[..., Any], timeout: float) -> tuple[FunctionReward, Any]:
    """The function as a Reward, and its ranges: declared, or as the probe videos show them."""
    dimensions, ranges = getattr(function, "dimensions", None), getattr(function, "ranges", None)
    if dimensions is None and ranges is not None:
        raise origin.wrong("has ranges and no dimensions; name its dimensions in the same order")
    if dimensions is not None:
        dimensions = _checked_names(origin, dimensions)
    if ranges is None:
        videos, prompts = probe_videos()
        answer = origin.told(lambda: origin.in_time(timeout, len(videos), lambda: function(videos, prompts)))
        shown = checked_answer(origin, answer, len(videos))
        dimensions = dimensions or _checked_names(origin, tuple(shown))
        ranges = tuple(_range_of(shown[name]) if name in shown else (0.0, 1.0) for name in dimensions)
    return FunctionReward(origin, function, tuple(dimensions or ()), bool(getattr(function, "trains", True))), ranges


def _range_of(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    # One value for all six says nothing of the spread: a range as wide as the value is large, at least 1.
    return (low, high) if high > low else (low, low + max(abs(low), 1.0))


def _checked_names(origin: Origin, names: Any) -> tuple[str, ...]:
    good = isinstance(names, tuple | list) and names and all(isinstance(name, str) and name for name in names)
    if not good or len(set(names)) != len(names) or set("".join(names)) & set(_SEPARATORS):
        raise origin.wrong(
            f"has the dimensions {names!r}; give a tuple of different words without any of {_SEPARATORS}"
        )
    return tuple(names)


def _checked_ranges(origin: Origin, ranges: Any, dimensions: tuple[str, ...]) -> tuple[tuple[float, float], ...]:
    try:
        table = np.asarray(ranges, np.float64)
    except (TypeError, ValueError):
        table = np.zeros(0)
    if table.shape != (len(dimensions), 2) or not np.isfinite(table).all() or not (table[:, 0] < table[:, 1]).all():
        raise origin.wrong(f"has the ranges {ranges!r}; give (lowest, highest) for each of {', '.join(dimensions)}")
    return tuple((float(low), float(high)) for low, high in table)
