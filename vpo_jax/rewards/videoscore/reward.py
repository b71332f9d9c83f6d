"""VideoScore (arXiv 2406.15252) as a Reward: an Idefics2 of 8 billion parameters with a head of five scores."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vpo_jax.checkpoints.scorer_folder import read_text
from vpo_jax.models.attention import check_attention
from vpo_jax.models.idefics2 import Idefics2ForSequenceClassification
from vpo_jax.rewards.frames import prepare_frames, see_in_parts
from vpo_jax.rewards.options import ModelOptions, check_options, option
from vpo_jax.rewards.protocol import DIMENSIONS, PyTree, candidates_of, check_videos
from vpo_jax.rewards.query import QUERY_FILE
from vpo_jax.rewards.videoscore.folder import read_videoscore
from vpo_jax.rewards.videoscore.frames import FrameSettings
from vpo_jax.rewards.videoscore.query import OWN_INSTRUCTION, FrameQueries, QueryEncoder
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import BATCH, constrain


@dataclasses.dataclass(frozen=True)
class Options(ModelOptions):
    """How a VideoScore is run; more in `ModelOptions`.

    Attributes:
      frame_choice: "arange" as in its authors' example, "linspace" as in their benchmark (first to last frame, a
        short video's frames more than once).
      max_frames: most frames that it reads: 16 for v1, up to 48 for v1.1.
    """

    frame_choice: str = option("arange", choices=("arange", "linspace"), in_config=True)
    max_frames: int = option(16, low=1, in_config=True)


@dataclasses.dataclass(frozen=True, eq=False)
class VideoScoreReward:
    """A VideoScore with its weights and what it is asked; see `Reward`."""

    name: str
    model: Idefics2ForSequenceClassification
    params: PyTree
    queries: FrameQueries
    frames: FrameSettings
    options: Options
    dimensions: tuple[str, ...] = DIMENSIONS
    ranges: tuple[tuple[float, float], ...] = ((1.0, 4.0),) * len(DIMENSIONS)
    trains: bool = True
    jittable: bool = True

    @property
    def videos_at_a_time(self) -> int:
        """Videos that fit into memory beside the weights."""
        return self.options.videos_at_a_time

    def frame_indices(self, num_frames: int) -> tuple[int, ...]:
        """At most `max_frames` of them, as `frame_choice` says."""
        return choose_frames(num_frames, self.options.max_frames, self.options.frame_choice)

    def prepare(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Token ids of instruction and prompt, and which of them are real: int32 and bool [P, L]."""
        return self.queries(prompts)

    def score(self, params: PyTree, videos: jax.Array | np.ndarray, prepared: PyTree) -> jax.Array:
        """uint8 [P * N, f, H, W, 3] -> float32 [P * N, 5], raw: nothing keeps them between 1 and 4.

        Instruction and prompt stand before the frames and are read once for the N candidates of a prompt.

        Raises:
          UserError: other videos than those, more frames than `max_frames`, or more tokens than the model has places.
        """
        videos = jnp.asarray(videos)
        text, text_mask = (jnp.asarray(prepared[name]) for name in ("input_ids", "mask"))  # [P, L]
        self._check(videos)
        candidates = candidates_of(len(videos), len(text))
        one_row = jnp.asarray(np.tile(self.queries.frame_ids, videos.shape[1]))  # [f * K]
        ids = jnp.broadcast_to(one_row, (len(videos), len(one_row)))
        mask = jnp.ones(ids.shape, bool)
        variables = {"params": params}
        images = self._see(variables, videos)
        if candidates == 1:
            ids, mask = jnp.concatenate([text, ids], axis=1), jnp.concatenate([text_mask, mask], axis=1)
            before = None
        else:
            before = self.model.apply(variables, text, text_mask, method="read")
            before = jax.tree.map(lambda x: jnp.repeat(x, candidates, axis=0), before)
        return jnp.asarray(self.model.apply(variables, ids, mask, images, before, method="judge"))

    def _see(self, variables: PyTree, videos: jax.Array) -> jax.Array:
        """Tokens of all frames, [B, f, T, C]."""

        def of_some(part: jax.Array) -> jax.Array:  # [B, g, H, W, 3]
            pixels = prepare_frames(self.frames, part)
            pixels = constrain(pixels.reshape(-1, *pixels.shape[2:]), BATCH)
            images = constrain(jnp.asarray(self.model.apply(variables, pixels, method="see")), BATCH)
            return images.reshape(*part.shape[:2], *images.shape[1:])

        return see_in_parts(of_some, videos, self.options.frames_at_a_time)

    def _check(self, videos: jax.Array) -> None:
        check_videos(videos)
        frames, most = videos.shape[1], self.options.max_frames
        if frames > most:
            raise UserError(
                f"videos: {frames} frames, and {self.name} reads {most} at most; take those of frame_indices"
            )
        tokens = self.queries.length + frames * len(self.queries.frame_ids)
        places = self.model.config.text.max_position_embeddings
        if tokens > places:
            raise UserError(
                f"max_prompt_tokens: instruction, prompt and {frames} frames make {tokens} tokens, but {self.name} "
                f"has {places} places (max_position_embeddings); lower max_prompt_tokens or max_frames"
            )


def choose_frames(num_frames: int, most: int, choice: str) -> tuple[int, ...]:
    """Which of a video's frames VideoScore reads, ascending.

    "arange" (the authors' run_videoscore.py): all of a short video, else every (num_frames / most)-th from the first.
    "linspace" (their benchmark): `most` of them from the first to the last, rounded down.
    """
    if choice == "linspace":
        return tuple(int(place) for place in np.linspace(0, num_frames - 1, most).astype(int))
    if num_frames <= most:
        return tuple(range(num_frames))
    places = np.arange(0, num_frames, num_frames / most).astype(int)
    # Rounding can make one place too many.
    return tuple(int(place) for place in places[:most])


def load(folder: str | Path, name: str | None = None, options: Options | None = None) -> VideoScoreReward:
    """The VideoScore of a folder, v1 or v1.1, in float32 or bfloat16 as it is stored.

    Its training's instruction is REGRESSION_QUERY_PROMPT in examples/run_videoscore.py of its authors' repository,
    TIGER-AI-Lab/VideoScore. Without it scores leave the published scale, and a warning says so. v1 nearly ignores the
    prompt: take v1.1. Frames under 240 pixels score low. docs/scorers.md says for which models it is the right one.

    Args:
      folder: saved as `Idefics2ForSequenceClassification`, with tokenizer.json and preprocessor_config.json.
      name: what it is called; the folder's name if left out.
      options: how it is run.

    Raises:
      UserError: as `read_videoscore`; an option or the query prompt that cannot be used.
    """
    options = options or Options()
    check_options("videoscore", options)
    parts = read_videoscore(folder, len(DIMENSIONS), options.dtype)
    query = read_text(options.query_prompt) if options.query_prompt else parts.query_prompt
    if query is None:
        warnings.warn(
            f"{folder}: no {QUERY_FILE}, so the scorer is asked in other words than it was trained with and its "
            "scores leave the published scale; copy REGRESSION_QUERY_PROMPT of the TIGER-AI-Lab/VideoScore repository "
            "(examples/run_videoscore.py) into that file",
            stacklevel=2,
        )
        query = OWN_INSTRUCTION
    config = parts.config
    tokens = config.perceiver.resampler_n_latents
    queries = QueryEncoder(parts.tokenizer, query, config.image_token_id, tokens, options.max_prompt_tokens)
    dtype = jax.tree.leaves(parts.params)[0].dtype
    check_attention("videoscore.attention", options.attention, dtype)
    model = Idefics2ForSequenceClassification(config, len(DIMENSIONS), dtype, options.attention)
    frames = FrameSettings.from_dict(parts.image_processor)
    if frames.shortest < config.vision.patch_size:
        raise UserError(
            f"preprocessor_config.size: shortest_edge {frames.shortest} is smaller than a patch of "
            f"{config.vision.patch_size}; use the file that belongs to this scorer"
        )
    return VideoScoreReward(name or Path(folder).resolve().name, model, parts.params, queries, frames, options)
