"""Scorers by name, by folder, or as MODULE:ATTRIBUTE."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vpo_jax.checkpoints import safetensors_io as io
from vpo_jax.checkpoints.untrusted import open_folder
from vpo_jax.rewards import custom
from vpo_jax.rewards.entry import Entry
from vpo_jax.rewards.options import config_limits
from vpo_jax.rewards.protocol import Reward
from vpo_jax.rewards.scoring import Scorer, make_scorer
from vpo_jax.rewards.table import SCORERS
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.paths import expand_user

Settings = Any  # a config's `reward`: a ConfigDict, or a dict of it


def load_reward(name_or_path: str, settings: Settings = None, field: str = "reward.scorers") -> Reward:
    """A scorer by its name, its folder, or as MODULE:ATTRIBUTE.

    "shapes" ships with the package; "classical" and "judge" (analytic, of the shapes world) are never used for
    training; those with `options` take their folder from `settings`; see `rewards.custom` for one of your own.

    Args:
      name_or_path: any of those.
      settings: a config's `reward`, where there is a config.
      field: what an error names.

    Raises:
      UserError: nothing that is a scorer, or one that cannot be loaded.
    """
    name_or_path = expand_user(name_or_path, field)
    entry, is_folder = SCORERS.get(name_or_path), Path(name_or_path).is_dir()
    if entry is not None and entry.make is not None:
        return entry.make()
    if entry is not None and (settings is not None or not is_folder):
        return _by_settings(name_or_path, entry, settings, field)
    if not is_folder:
        if ":" in name_or_path:
            return custom.load(name_or_path, field, custom.TIMEOUT if settings is None else settings["timeout"])
        raise UserError(
            f"{field}: {str(name_or_path)!r} is no scorer; known names are {', '.join(sorted(SCORERS))}, a folder with "
            "config.json and model.safetensors is one too, and so is your own MODULE:FUNCTION"
        )
    kind = class_of(name_or_path)
    by_class = _loaders()
    if kind not in by_class:
        raise UserError(
            f"{name_or_path}: config.json says {kind!r}, which is no scorer; known classes are {', '.join(by_class)}"
        )
    return by_class[kind](name_or_path)


def load_rewards(
    names: str, training: bool = False, settings: Settings = None, field: str | None = None
) -> tuple[Reward, ...]:
    """Scorers of a comma-separated list; with `training`, those that are for evaluation only are refused.

    `settings` is a config's `reward`; `field` is what errors name, reward.scorers or held_out.scorers if left out.

    Raises:
      UserError: as `load_reward`; an empty list for training; a scorer for evaluation only.
    """
    field = field or ("reward.scorers" if training else "held_out.scorers")
    rewards = tuple(load_reward(name, settings, field) for name in _split(names))
    if training and not rewards:
        raise UserError("reward.scorers: is empty; name at least one scorer, as shapes")
    for reward in rewards:
        if training and not reward.trains:
            raise UserError(f"reward.scorers: {reward.name} is for evaluation only; name it in held_out.scorers")
    return rewards


def abstract_rewards(names: str, settings: Settings) -> tuple[Reward, ...]:
    """Scorers of a comma-separated list for a plan: published ones with shapes for `params`, the others loaded.

    Args:
      names: as a config's `reward.scorers`.
      settings: a config's `reward`.

    Raises:
      UserError: as `load_reward`.
    """
    return tuple(_abstract(name, settings) or load_reward(name, settings) for name in _split(names))


def load_scorer(name_or_path: str, field: str = "scorer") -> Scorer:
    """A scorer to call: `load_scorer("shapes")(videos, prompts)` -> {dimension: float32 [B]}.

    Raises:
      UserError: as `load_reward`; its message names `field`.
    """
    return make_scorer(load_reward(str(name_or_path), field=field))


def class_of(folder: str | Path) -> str:
    """The class of the scorer in `folder`: `_class_name`, or transformers' first of `architectures`.

    A folder without config.json is of the scorer whose `marker` file it has.

    Raises:
      UserError: there is no such folder, or no scorer in it.
    """
    folder = open_folder(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; a scorer is a folder with config.json in it")
    if not (folder / "config.json").is_file():
        for entry in SCORERS.values():
            if entry.marker and (folder / entry.marker).is_file():
                return entry.classes[0]
    config = io.read_json(folder / "config.json")
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    return str(config.get("_class_name", named))


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _loaders() -> dict[str, Callable[..., Reward]]:
    return {kind: entry.load for entry in SCORERS.values() if entry.load for kind in entry.classes}


def _abstract(name: str, settings: Settings) -> Reward | None:
    entry = SCORERS.get(name)
    if entry is None or entry.abstract is None or entry.options is None or Path(name).is_dir():
        return None
    return entry.abstract(name, _options_of(name, entry.options, settings))


def _options_of(name: str, options: type[Any], settings: Settings) -> Any:
    given = settings[name]
    return options(**{field: given[field] for field in config_limits(options) if field in given})


def _by_settings(name: str, entry: Entry, settings: Settings, field: str) -> Reward:
    assert entry.load is not None and entry.options is not None
    if settings is None:
        raise UserError(f"{field}: {name} has its folder in a run's config only; give the folder itself here")
    path = settings[name]["path"]
    if not path:
        raise UserError(
            f"reward.{name}.path: is empty, but {field} names {name}; give the folder of its weights with "
            f"--config.reward.{name}.path=DIR"
        )
    if not Path(path).is_dir():
        raise UserError(f"reward.{name}.path: {path}: no such folder; give the folder of its weights")
    options = _options_of(name, entry.options, settings)
    for key, (_, limits) in config_limits(entry.options).items():
        file = getattr(options, key)
        if limits.is_file and file and not Path(file).is_file():
            raise UserError(f"reward.{name}.{key}: there is no file {file}; give a text file, or nothing")
    kind = class_of(path)
    if kind not in entry.classes:
        raise UserError(
            f"reward.{name}.path: {path} holds {kind!r} and no {' or '.join(entry.classes)}; name it in {field} itself"
        )
    return entry.load(path, name, options)
