"""A person's own reward: an object or a plain Python function in a module that they name as "module:attribute".

A function gets whole clips on the host and gives a score of each for every dimension, higher is better:

    def my_reward(videos, prompts):       # uint8 [B, F, H, W, 3], list of B str
        return {"brightness": videos.mean((1, 2, 3, 4))}

    my_reward.dimensions = ("brightness",)
    my_reward.ranges = ((0.0, 255.0),)    # lowest and highest value that each is meant to take
    my_reward.trains = True               # False: it may only judge

All three attributes may be missing. Without `dimensions` the function is called once at the start on six small clips,
and what it gives is taken; without `ranges` they are what it gives there (a hundredth of a range is the least
deviation that counts, so the order of magnitude is enough); without `trains` it trains. A dimension called
"dynamic_degree" feeds the motion gate.

It runs in a thread of its own, so that one that hangs can be told: what torch keeps for a thread (`torch.no_grad()`)
belongs inside the function. With reward.timeout=0 it runs in the main thread.

An object follows `rewards.protocol.Reward`; with `jittable` true its `score` is compiled with the rest and has no
time-out.
"""

import dataclasses
import importlib
import inspect
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vpo_jax.runtime.errors import UserError

TIMEOUT = 600.0  # seconds; the default of reward.timeout
_PROTOCOL = ("name", "dimensions", "ranges", "trains", "jittable", "params", "frame_indices", "prepare", "score")
_SEPARATORS = "/,="  # of reward.weights


class Origin(NamedTuple):
    """Where a reward comes from: "module:attribute", and the field that names it."""

    source: str
    field: str

    def wrong(self, words: str) -> UserError:
        """The error that says so."""
        return UserError(f"{self.field}: {self.source} {words}")

    def told(self, call: Callable[[], Any]) -> Any:
        """`call()`; what it raises becomes a UserError with its kind, its words and the line of the person's module."""
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            raise self.wrong(f"raised {_described(error, self.source)}; mend it") from error

    def in_time(self, seconds: float, videos: int, call: Callable[[], Any]) -> Any:
        """`call()` in a thread that does not keep the process alive; 0 seconds: here, and without a limit.

        Raises:
          UserError: it has not come back in time. It goes on, and nobody waits for it.
        """
        if not seconds:
            return call()
        outcome: list[tuple[Any, BaseException | None]] = []

        def work() -> None:
            try:
                outcome.append((call(), None))
            except BaseException as error:  # noqa: BLE001 (raised again in the thread that waits)
                outcome.append((None, error))

        thread = threading.Thread(target=work, name="reward", daemon=True)
        thread.start()
        thread.join(seconds)
        if not outcome:
            raise UserError(
                f"reward.timeout: {self.source} has not answered for {videos} videos in {seconds:g} s; mend it, or "
                "give it more time with --config.reward.timeout=SECONDS (0 = no limit); a run continues from its last "
                "checkpoint by the same command"
            )
        value, failure = outcome[0]
        if isinstance(failure, SystemExit):
            raise self.wrong("called sys.exit; let it raise or return") from failure
        if failure is not None:
            raise failure
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class CustomReward:
    """A person's reward whose mistakes become UserErrors that name it; see `Reward`.

    Attributes:
      inner: follows `Reward`.
      timeout: seconds that `score` may take on the host; 0 is no limit.
    """

    origin: Origin
    inner: Any
    timeout: float
    name: str
    dimensions: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]

    @property
    def trains(self) -> bool:
        """As the object says."""
        return bool(self.inner.trains)

    @property
    def jittable(self) -> bool:
        """As the object says."""
        return bool(self.inner.jittable)

    @property
    def params(self) -> Any:
        """As the object says."""
        return self.inner.params

    def frame_indices(self, num_frames: int) -> tuple[int, ...]:
        """Its frames.

        Raises:
          UserError: none, or not ascending, or not of the clip.
        """
        given = self.origin.told(lambda: [int(i) for i in self.inner.frame_indices(num_frames)])
        if not given or sorted(set(given)) != given or given[0] < 0 or given[-1] >= num_frames:
            raise self.origin.wrong(
                f"gives {given} as frame_indices({num_frames}); give ascending numbers from 0 to {num_frames - 1}"
            )
        return tuple(given)

    def prepare(self, prompts: Sequence[str]) -> Any:
        """What it makes of the prompts."""
        return self.origin.told(lambda: self.inner.prepare(list(prompts)))

    def score(self, params: Any, videos: Any, prepared: Any) -> Any:
        """[B, D] scores, finite or not.

        Raises:
          UserError: an exception inside, another shape, or no answer within `timeout` seconds (on the host).
        """
        if self.jittable:
            scores = self.origin.told(lambda: self.inner.score(params, videos, prepared))
        else:
            # A copy: what comes from a device cannot be written to.
            ask = lambda: np.asarray(self.inner.score(params, np.array(videos), prepared), np.float32)  # noqa: E731
            scores = self.origin.told(lambda: self.origin.in_time(self.timeout, len(videos), ask))
        wanted = (len(videos), len(self.dimensions))
        if getattr(scores, "shape", None) != wanted:
            raise self.origin.wrong(
                f"gives scores of shape {list(np.shape(scores))} for {wanted[0]} videos and {wanted[1]} dimensions; "
                f"give {list(wanted)}"
            )
        return scores


@dataclasses.dataclass(frozen=True, eq=False)
class _Function:
    """A plain function as a Reward."""

    origin: Origin
    function: Callable[..., Any]
    dimensions: tuple[str, ...]
    trains: bool
    jittable: bool = False
    params: Any = dataclasses.field(default_factory=dict)

    def frame_indices(self, num_frames: int) -> tuple[int, ...]:
        return tuple(range(num_frames))

    def prepare(self, prompts: Sequence[str]) -> np.ndarray:
        return np.array(list(prompts), dtype=object)

    def score(self, params: Any, videos: np.ndarray, prepared: np.ndarray) -> np.ndarray:
        if not len(videos):
            return np.zeros((0, len(self.dimensions)), np.float32)
        given = _checked_answer(self.origin, self.function(videos, list(prepared)), len(videos))
        if set(given) != set(self.dimensions):
            raise self.origin.wrong(
                f"gives the dimensions {', '.join(given)}, declared are {', '.join(self.dimensions)}; give those"
            )
        return np.stack([given[name] for name in self.dimensions], axis=1)


def load_custom(source: str, field: str, timeout: float = TIMEOUT) -> CustomReward:
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


def probe_clips() -> tuple[np.ndarray, list[str]]:
    """Six clips and prompts on which a function shows its dimensions and ranges: uint8 [6, 8, 64, 64, 3].

    Black, white, noise that stays, noise that changes, and a slope that stays and one that moves.
    """
    rng = np.random.default_rng(0)
    shape = (8, 64, 64, 3)
    slope = np.broadcast_to(np.arange(64)[None, None, :, None] * 4, shape)
    moving = np.stack([np.roll(frame, 4 * i, axis=1) for i, frame in enumerate(slope)])
    noise = rng.integers(0, 256, shape)
    still = np.broadcast_to(noise[:1], shape)
    clips = [np.zeros(shape), np.full(shape, 255), still, noise, slope, moving]
    return np.stack(clips).astype(np.uint8), ["a red ball that rolls"] * len(clips)


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
        raise origin.wrong(f"cannot be imported: {_described(error, origin.source)}; mend it") from error
    if not hasattr(module, attribute):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise origin.wrong(f"is missing: {module_name} has {', '.join(known) or 'no function'}; name what is there")
    return getattr(module, attribute)


def _from_function(origin: Origin, function: Callable[..., Any], timeout: float) -> tuple[_Function, Any]:
    """The function as a Reward, and its ranges: declared, or as the probe clips show them."""
    dimensions, ranges = getattr(function, "dimensions", None), getattr(function, "ranges", None)
    if dimensions is None and ranges is not None:
        raise origin.wrong("has ranges and no dimensions; name its dimensions in the same order")
    if dimensions is not None:
        dimensions = _checked_names(origin, dimensions)
    if ranges is None:
        videos, prompts = probe_clips()
        answer = origin.told(lambda: origin.in_time(timeout, len(videos), lambda: function(videos, prompts)))
        shown = _checked_answer(origin, answer, len(videos))
        dimensions = dimensions or _checked_names(origin, tuple(shown))
        ranges = tuple(_range_of(shown[name]) if name in shown else (0.0, 1.0) for name in dimensions)
    return _Function(origin, function, tuple(dimensions or ()), bool(getattr(function, "trains", True))), ranges


def _range_of(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    # One value for all six says nothing of the spread: a range as wide as the value is large, at least 1.
    return (low, high) if high > low else (low, low + max(abs(low), 1.0))


def _checked_answer(origin: Origin, answer: Any, count: int) -> dict[str, np.ndarray]:
    fix = f"give {{dimension: [one number a video]}}, here {count} each"
    if not isinstance(answer, Mapping) or not answer:
        raise origin.wrong(f"gives {type(answer).__name__}; {fix}")
    scores = {}
    for name, values in answer.items():
        try:
            column = np.asarray(values, np.float32)
        except (TypeError, ValueError) as error:
            raise origin.wrong(f"gives no numbers for {name!r} ({error}); {fix}") from error
        if column.shape != (count,):
            raise origin.wrong(f"gives shape {list(column.shape)} for {name!r}; {fix}")
        scores[str(name)] = column
    return scores


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


def _described(error: BaseException, source: str) -> str:
    """The error's kind and words, and the last line of the person's own module that it came through."""
    frames = list(traceback.extract_tb(error.__traceback__))
    stem = source.partition(":")[0].rpartition(".")[2]
    frames = [frame for frame in frames if Path(frame.filename).stem == stem] or frames[-1:]
    place = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    words = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}{place}" + (f" ({words})" if words else "")
