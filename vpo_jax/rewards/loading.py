"""Scorers by name or folder, and the function that people call."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vpo_jax.checkpoints import videoreward, videoscore
from vpo_jax.checkpoints.scorers import CLASS, scorer_class
from vpo_jax.rewards.classical import ClassicalReward
from vpo_jax.rewards.custom import TIMEOUT, load_custom
from vpo_jax.rewards.judge import JudgeReward
from vpo_jax.rewards.protocol import Reward
from vpo_jax.rewards.shapes import load_video_scorer
from vpo_jax.rewards.videoreward import VideoRewardOptions, load_videoreward
from vpo_jax.rewards.videoscore import VideoScoreOptions, load_videoscore
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import CLIPS, PARAMETER_RULES, constrain, infer_shardings
from vpo_jax.runtime.paths import expand_user
from vpo_jax.runtime.processes import place

SHIPPED_SCORER = Path(__file__).resolve().parents[1] / "shapes" / "assets" / "scorer"
_BATCH = 32  # clips scored in one compiled call, where the scorer has no number of its own


def _shipped() -> Reward:
    return load_video_scorer(SHIPPED_SCORER, "shapes")


_BY_NAME: dict[str, Callable[[], Reward]] = {"classical": ClassicalReward, "judge": JudgeReward, "shapes": _shipped}
_BY_CLASS: dict[str, Callable[[str], Reward]] = {CLASS: load_video_scorer, videoscore.CLASS: load_videoscore}
_BY_CLASS |= dict.fromkeys(videoreward.CLASSES, load_videoreward)
# Names whose folder and options stand in the config, under reward.NAME.
_BY_SETTINGS: dict[str, tuple[tuple[str, ...], Callable[..., Reward], Callable[..., Any]]] = {
    "videoreward": (videoreward.CLASSES, load_videoreward, VideoRewardOptions),
    "videoscore": ((videoscore.CLASS,), load_videoscore, VideoScoreOptions),
}


def load_reward(name_or_path: str, settings: Any = None, field: str = "reward.scorers") -> Reward:
    """A scorer by its name, its folder, or as MODULE:ATTRIBUTE.

    "shapes" ships with the package; "classical" and "judge" (analytic, of the shapes world) never train; "videoscore"
    and "videoreward" take their folder from `settings`; see `rewards.custom` for one of your own.

    Args:
      name_or_path: any of those.
      settings: a config's `reward`, where there is a config.
      field: what an error names.

    Raises:
      UserError: nothing that is a scorer, or one that cannot be loaded.
    """
    name_or_path = expand_user(name_or_path, field)
    if name_or_path in _BY_NAME:
        return _BY_NAME[name_or_path]()
    if name_or_path in _BY_SETTINGS and (settings is not None or not Path(name_or_path).is_dir()):
        return _by_settings(name_or_path, settings, field)
    if not Path(name_or_path).is_dir():
        if ":" in name_or_path:
            return load_custom(name_or_path, field, TIMEOUT if settings is None else settings["timeout"])
        known = ", ".join(sorted([*_BY_NAME, *_BY_SETTINGS]))
        raise UserError(
            f"{field}: {str(name_or_path)!r} is no scorer; known names are {known}, a folder with "
            "config.json and model.safetensors is one too, and so is your own MODULE:FUNCTION"
        )
    kind = scorer_class(name_or_path)
    if kind not in _BY_CLASS:
        raise UserError(
            f"{name_or_path}: config.json says {kind!r}, which is no scorer; known classes are {', '.join(_BY_CLASS)}"
        )
    return _BY_CLASS[kind](name_or_path)


def _by_settings(name: str, settings: Any, field: str) -> Reward:
    classes, load, options = _BY_SETTINGS[name]
    if settings is None:
        raise UserError(f"{field}: {name} has its folder in a run's config only; give the folder itself here")
    values = dict(settings[name].items())
    path, query = values.pop("path"), values["query_prompt"]
    if not path:
        raise UserError(
            f"reward.{name}.path: is empty, but {field} names {name}; give the folder of its weights with "
            f"--config.reward.{name}.path=DIR"
        )
    if not Path(path).is_dir():
        raise UserError(f"reward.{name}.path: {path}: no such folder; give the folder of its weights")
    if query and not Path(query).is_file():
        raise UserError(f"reward.{name}.query_prompt: there is no file {query}; give a text file, or nothing")
    kind = scorer_class(path)
    if kind not in classes:
        raise UserError(
            f"reward.{name}.path: {path} holds {kind!r} and no {' or '.join(classes)}; name it in {field} itself"
        )
    return load(path, name, options(**values))


def load_rewards(
    names: str, training: bool = False, settings: Any = None, field: str | None = None
) -> tuple[Reward, ...]:
    """Scorers of a comma-separated list; with `training`, those that may only judge are refused.

    `settings` is a config's `reward`; `field` is what errors name, reward.scorers or held_out.scorers if left out.

    Raises:
      UserError: as `load_reward`; an empty list for training; the judge for training.
    """
    field = field or ("reward.scorers" if training else "held_out.scorers")
    rewards = tuple(load_reward(name.strip(), settings, field) for name in names.split(",") if name.strip())
    if training and not rewards:
        raise UserError("reward.scorers: is empty; name at least one scorer, as shapes")
    for reward in rewards:
        if training and not reward.trains:
            raise UserError(f"reward.scorers: {reward.name} only judges and never trains; use it in held_out.scorers")
    return rewards


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """A scorer as a function of whole videos: `scorer(videos, prompts)`."""

    reward: Reward
    _score: Callable[..., jax.Array | np.ndarray]
    _params: Any = None  # where the reward's own lie elsewhere
    _devices: int = 1

    def __call__(self, videos: np.ndarray, prompts: str | Sequence[str]) -> dict[str, np.ndarray]:
        """Scores of uint8 [B, F, H, W, 3] against a prompt for each: {dimension: float32 [B]}.

        Raises:
          UserError: videos of another type or shape, or another number of prompts than of videos.
        """
        videos = np.asarray(videos)
        if videos.ndim != 5 or videos.shape[-1] != 3 or videos.dtype != np.uint8 or 0 in videos.shape:
            raise UserError(f"videos: must be uint8 [B, F, H, W, 3], found {videos.dtype} {list(videos.shape)}")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(videos):
            raise UserError(f"prompts: {len(prompts)} for {len(videos)} videos; give one to each")
        frames = list(self.reward.frame_indices(videos.shape[1]))
        prepared = self.reward.prepare(prompts)
        params = self.reward.params if self._params is None else self._params
        most = -(-len(videos) // self._devices) * self._devices
        batch = min(getattr(self.reward, "clips_at_a_time", _BATCH) * self._devices, most)
        parts = []
        for start in range(0, len(videos), batch):
            # The last batch is filled up with clips that are not returned: one shape, one compilation.
            rows = np.minimum(np.arange(start, start + batch), len(videos) - 1)
            part = self._score(params, videos[rows][:, frames], jax.tree.map(lambda x, rows=rows: x[rows], prepared))
            parts.append(np.asarray(part)[: len(videos) - start])
        scores = np.concatenate(parts).astype(np.float32)
        return {name: scores[:, i] for i, name in enumerate(self.reward.dimensions)}


def make_scorer(reward: Reward, mesh: Mesh | None = None) -> Scorer:
    """A scorer as a function; on a mesh its weights are cut by the rules, and each device scores its share of clips."""
    if not reward.jittable:
        return Scorer(reward, reward.score)
    if mesh is None:
        # Else every call would copy the weights from the host, which a CPU does not.
        params = None if jax.default_backend() == "cpu" else jax.device_put(reward.params)
        return Scorer(reward, jax.jit(reward.score), params)

    def shared(params: Any, videos: jax.Array, prepared: Any) -> jax.Array | np.ndarray:
        return reward.score(params, *jax.tree.map(lambda x: constrain(x, CLIPS), (videos, prepared)))

    score = jax.jit(shared)

    def on_mesh(*arguments: Any) -> jax.Array:
        with jax.set_mesh(mesh):
            return score(*arguments)

    params = place(reward.params, infer_shardings(reward.params, mesh, PARAMETER_RULES))
    return Scorer(reward, on_mesh, params, mesh.size)


def load_scorer(name_or_path: str, field: str = "scorer") -> Scorer:
    """A scorer to call: `load_scorer("shapes")(videos, prompts)` -> {dimension: float32 [B]}.

    Raises:
      UserError: as `load_reward`; its message names `field`.
    """
    return make_scorer(load_reward(str(name_or_path), field=field))
