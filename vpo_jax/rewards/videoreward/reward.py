"""VideoReward (arXiv 2501.13918) as a Reward: a Qwen2-VL of 2 billion parameters that scores at three tokens."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.checkpoints.scorer_folder import read_text
from vpo_jax.models.attention import check_attention
from vpo_jax.models.config_fields import require
from vpo_jax.models.qwen2_vl import Qwen2VLRewardModel, count_positions, grid_positions
from vpo_jax.rewards.frames import prepare_frames, see_in_parts
from vpo_jax.rewards.options import ModelOptions, check_options, option
from vpo_jax.rewards.protocol import PyTree, check_videos, repeat_rows
from vpo_jax.rewards.query import QUERY_FILE
from vpo_jax.rewards.videoreward.folder import REWARD_TOKENS, RewardSettings, read_videoreward
from vpo_jax.rewards.videoreward.frames import SmartFrameSettings
from vpo_jax.rewards.videoreward.query import OWN_INSTRUCTION, HeadQueries, VideoQueryEncoder
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import BATCH, constrain

REWARD_DIMENSIONS = ("visual_quality", "motion_quality", "text_to_video_alignment")
_MIN_FRAMES = 4  # of a video that has as many (FPS_MIN_FRAMES of its authors' vision_process.py)
# Scores leave with mean 0 and deviation 1 over the authors' data; raw ones have the published means and deviations
# of about 3 and 2.
_NORMALISED, _RAW = (-3.0, 3.0), (-4.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """How a VideoReward is run; more in `ModelOptions`. Its query prompt names each reward token once.

    Attributes:
      positions: "count", as the published scorer was trained and is run, or "grid", Qwen2-VL's own of three axes.
      num_frames: that it reads, even; 0 takes those of model_config.json, which may follow from frames a second.
      video_fps: frames a second of the videos that it is given.
      min_pixels: least pixels of a frame that the model sees; the most are in model_config.json.
    """

    positions: str = option("count", choices=("count", "grid"))
    num_frames: int = option(0, low=0)
    video_fps: float = option(8.0, above=0.0, in_config=True)
    min_pixels: int = option(128 * 28 * 28, low=1)
    frames_at_a_time: int = option(8, low=1)


@dataclasses.dataclass(frozen=True, eq=False)
class VideoRewardReward:
    """A VideoReward with its weights and what it is asked; see `Reward`."""

    name: str
    model: Qwen2VLRewardModel
    params: PyTree
    queries: HeadQueries
    frames: SmartFrameSettings
    settings: RewardSettings
    options: Options
    dimensions: tuple[str, ...] = REWARD_DIMENSIONS
    trains: bool = True
    jittable: bool = True

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """Three deviations to each side of the mean; nothing keeps scores inside."""
        return (_RAW if self.settings.mean is None else _NORMALISED,) * len(self.dimensions)

    @property
    def videos_at_a_time(self) -> int:
        """Videos that fit into memory beside the weights."""
        return self.options.videos_at_a_time

    def frame_indices(self, num_frames: int) -> tuple[int, ...]:
        """An even number of them, from the first to the last.

        Raises:
          UserError: a video of one frame.
        """
        seconds = num_frames / self.options.video_fps
        fixed = self.options.num_frames or self.settings.num_frames
        wanted = fixed or max(seconds * self.settings.fps, _MIN_FRAMES)
        return choose_frames(num_frames, wanted, self.model.config.vision.temporal_patch_size, self.name)

    def prepare(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Token ids of the question and which of them are real: int32 and bool [P, L].

        Raises:
          UserError: an empty prompt.
        """
        empty = [row for row, prompt in enumerate(prompts) if not prompt.strip()]
        if empty:
            raise UserError(
                f"prompts: number {empty[0] + 1} is empty, and {self.name} scores how well a video shows its prompt; "
                "give the prompt that each video was made for"
            )
        return self.queries(prompts)

    def score(self, params: PyTree, videos: jax.Array | np.ndarray, prepared: PyTree) -> jax.Array:
        """uint8 [P * N, f, H, W, 3] -> float32 [P * N, 3], normalised where model_config.json says how.

        A video stands before its prompt, so nothing can be read once for several candidates.

        Raises:
          UserError: other videos than those, an odd number of frames, or more tokens than the model has places.
        """
        videos = jnp.asarray(videos)
        grid = self._check(videos)
        rows = repeat_rows({name: jnp.asarray(prepared[name]) for name in ("input_ids", "mask")}, len(videos))
        text, text_mask = rows["input_ids"], rows["mask"]  # [P * N, L]
        pads = np.full(np.prod(grid), self.model.config.video_token_id, np.int32)
        head = jnp.asarray(np.concatenate([self.queries.head_ids, pads]))
        ids = jnp.concatenate([jnp.broadcast_to(head, (len(videos), len(head))), text], axis=1)
        mask = jnp.concatenate([jnp.ones((len(videos), len(head)), bool), text_mask], axis=1)
        positions = count_positions(mask)
        if self.options.positions == "grid":
            positions = grid_positions(mask, ids == self.model.config.video_token_id, grid)
        variables = {"params": params}
        seen = self._see(variables, videos)
        scores = jnp.asarray(self.model.apply(variables, ids, mask, positions, seen, method="judge"))
        if self.settings.mean is None:
            return scores
        return (scores - np.array(self.settings.mean, np.float32)) / np.array(self.settings.std, np.float32)

    def _see(self, variables: PyTree, videos: jax.Array) -> jax.Array:
        """Tokens of all frames, [B, T, C]."""

        def of_some(part: jax.Array) -> jax.Array:  # [B, g, H, W, 3]
            pixels = constrain(prepare_frames(self.frames, part), BATCH)
            return constrain(jnp.asarray(self.model.apply(variables, pixels, method="see")), BATCH)

        unit = self.model.config.vision.temporal_patch_size
        return see_in_parts(of_some, videos, self.options.frames_at_a_time, unit)

    def _check(self, videos: jax.Array) -> tuple[int, int, int]:
        """The grid of a video's tokens: times, rows, columns."""
        check_videos(videos)
        frames, vision = videos.shape[1], self.model.config.vision
        if frames % vision.temporal_patch_size:
            raise UserError(
                f"videos: {frames} frames, and {self.name} reads {vision.temporal_patch_size} together; "
                "take those of frame_indices"
            )
        height, width = self.frames.output_size(*videos.shape[2:4])
        grid = (frames // vision.temporal_patch_size, height // vision.factor, width // vision.factor)
        tokens = len(self.queries.head_ids) + int(np.prod(grid)) + self.queries.length
        places = self.model.config.text.max_position_embeddings
        if tokens > places:
            raise UserError(
                f"max_prompt_tokens: question, prompt and {frames} frames make {tokens} tokens, but {self.name} has "
                f"{places} places (max_position_embeddings); lower max_prompt_tokens, num_frames or max_frame_pixels"
            )
        return grid


def choose_frames(num_frames: int, wanted: float, unit: int, name: str) -> tuple[int, ...]:
    """Which of a video's frames VideoReward reads: `wanted`, or as many as there are, in a multiple of `unit`.

    From the first to the last, rounded (sample_type "uniform" of its authors' vision_process.py).

    Raises:
      UserError: a video of fewer frames than `unit`.
    """
    count = round(min(wanted, num_frames // unit * unit) / unit) * unit
    if count < unit:
        raise UserError(f"videos: {num_frames} frames, and {name} needs {unit} or more; give longer videos")
    return tuple(int(place) for place in np.linspace(0, num_frames - 1, count).round())


def load(folder: str | Path, name: str | None = None, options: Options | None = None) -> VideoRewardReward:
    """The VideoReward of a folder, in float32 or bfloat16 as it is stored; a LoRA is merged into its base.

    Its training's question is DETAILED_PROMPT_WITH_SPECIAL_TOKEN in prompt_template.py of its authors' repository,
    KwaiVGI/VideoAlign. Without it scores leave the published scale, and a warning says so.

    The authors' code runs on transformers 4.45, whose decoder counts tokens where it is given no positions, and gives
    it none; `positions` is "count" for that reason.

    Args:
      folder: see `rewards.videoreward.folder`.
      name: what it is called; the folder's name if left out.
      options: how it is run.

    Raises:
      UserError: as `read_videoreward`; an option or the query prompt that cannot be used.
    """
    options = options or Options()
    check_options("videoreward", options)
    parts = read_videoreward(folder, options.dtype)
    query = read_text(options.query_prompt) if options.query_prompt else parts.query_prompt
    if query is None:
        warnings.warn(
            f"{folder}: no {QUERY_FILE}, so the scorer is asked in other words than it was trained with and its "
            "scores leave the published scale; copy DETAILED_PROMPT_WITH_SPECIAL_TOKEN of the KwaiVGI/VideoAlign "
            "repository (prompt_template.py) into that file",
            stacklevel=2,
        )
        query = OWN_INSTRUCTION
    config, settings = parts.config, parts.settings
    queries = VideoQueryEncoder(parts.tokenizer, query, config.video_token_id, REWARD_TOKENS, options.max_prompt_tokens)
    most = settings.max_frame_pixels
    large = f"{most} is less than min_pixels {options.min_pixels}; use the file that belongs to this scorer"
    require(most >= options.min_pixels, "data_config.max_frame_pixels", large)
    unit = config.vision.temporal_patch_size
    whole = f"{options.num_frames} is no multiple of the {unit} frames that are read together"
    require(options.num_frames % unit == 0, "videoreward.num_frames", whole)
    frames = SmartFrameSettings.from_dict(parts.image_processor, config.vision.factor, options.min_pixels, most)
    dtype = jax.tree.leaves(parts.params)[0].dtype
    check_attention("videoreward.attention", options.attention, dtype)
    model = Qwen2VLRewardModel(config, queries.reward_token_ids, settings.outputs, dtype, options.attention)
    return VideoRewardReward(
        name or Path(folder).resolve().name, model, parts.params, queries, frames, settings, options
    )
