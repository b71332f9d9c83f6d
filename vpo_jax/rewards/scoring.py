"""Running scorers on batches: on a mesh, in microbatches, on the host. Training, evaluation and commands share it."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vpo_jax.rewards.protocol import PyTree, Reward, candidates_of, repeat_rows
from vpo_jax.runtime.batches import in_microbatches
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import PARAMETER_RULES, ROWS, batch_sharding, constrain, infer_shardings
from vpo_jax.runtime.processes import fetch, place, share, unshare

Videos = jax.Array | np.ndarray
ScoreFunction = Callable[[PyTree, Videos, PyTree], Videos]

_BATCH = 32  # videos scored in one compiled call, where the scorer has no number of its own


def frames_to_decode(rewards: Sequence[Reward], num_frames: int) -> tuple[int, ...]:
    """The union of the frames that the scorers read, in order."""
    return tuple(sorted({i for reward in rewards for i in reward.frame_indices(num_frames)}))


def bring(batch: jax.Array, mesh: Mesh) -> jax.Array:
    """A batch on `mesh`: as it is if it is there, else copied and sharded along its first axis."""
    if getattr(batch.sharding, "mesh", None) == mesh:
        return batch
    return jax.device_put(batch, batch_sharding(mesh))


class Weights:
    """Scorers' parameters where they are computed: sharded over a mesh by the rules, once for all uses.

    With `offload` they stay in host memory between calls, and every call copies them to the devices.
    """

    def __init__(self, mesh: Mesh, offload: bool = False) -> None:
        self.mesh, self._offload = mesh, offload
        self._placed: dict[int, PyTree] = {}

    def __call__(self, reward: Reward) -> PyTree:
        """The parameters of one scorer, as its `score` takes them."""
        if not reward.jittable:
            return reward.params
        placed = self._placed.get(id(reward))
        if placed is None:
            placed = place(reward.params, infer_shardings(reward.params, self.mesh, PARAMETER_RULES))
            if not self._offload:
                self._placed[id(reward)] = placed
        return placed


def score_function(reward: Reward, places: Sequence[int] | None = None, microbatch: int = 0) -> ScoreFunction:
    """`score(params, videos uint8 [P * N, f, H, W, 3], prepared [P, ...]) -> [P * N, D]` of a scorer, jitted.

    Under `jax.set_mesh` every device scores its own videos, and reads the prompts of those alone.

    Args:
      reward: jittable.
      places: of the frames that the scorer reads, among the f frames; None where those are all.
      microbatch: videos at a time; 0 = all. Each holds whole prompts with all their candidates where it can, else
        prompts are read once for as many candidates as lie together.
    """

    def score(params: PyTree, videos: jax.Array, prepared: PyTree) -> Videos:
        return reward.score(params, _frames(videos, places), prepared)

    def score_all(params: PyTree, videos: jax.Array, prepared: PyTree) -> Videos:
        together = candidates_together(len(videos), _rows(prepared, len(videos)), microbatch, _parts())
        groups = len(videos) // together  # of candidates of one prompt, for which it is read once
        prepared = repeat_rows(prepared, groups)
        if not microbatch or microbatch >= len(videos):
            return score(params, _on_devices(videos), _on_devices(prepared))

        def of_chunk(chunk: tuple[jax.Array, PyTree]) -> jax.Array:
            some, rows = chunk  # [G, together, f, H, W, 3] and [G, ...]
            some = some.reshape(-1, *some.shape[2:])
            scores = jnp.asarray(score(params, _on_devices(some), _on_devices(rows)))
            return scores.reshape(-1, together, *scores.shape[1:])

        grouped = videos.reshape(groups, together, *videos.shape[1:])
        scores: jax.Array = in_microbatches(of_chunk, (grouped, prepared), microbatch // together)
        return scores.reshape(len(videos), -1)

    return jax.jit(score_all)


def candidates_together(videos: int, prompts: int, microbatch: int, parts: int) -> int:
    """The most candidates of a prompt, a divisor of N, that one microbatch on one of `parts` devices can hold.

    Microbatches and the shares of devices are then whole groups of so many videos, and a prompt is read once a group.
    1 is a row for each video.
    """
    candidates, size = candidates_of(videos, prompts), min(microbatch or videos, videos)
    parts = parts if size % parts == 0 else 1  # a batch that the devices cannot share is replicated
    return max(n for n in range(1, candidates + 1) if candidates % n == 0 and size % (n * parts) == 0)


def _rows(prepared: PyTree, videos: int) -> int:
    """Prompts that were prepared; a scorer that keeps nothing of them has a row for each video."""
    leaves = jax.tree.leaves(prepared)
    return len(leaves[0]) if leaves else videos


def _frames(videos: Videos, places: Sequence[int] | None) -> Videos:
    return videos if places is None else videos[:, np.array(places)]


def _parts() -> int:
    """Number of shares that the devices of `jax.set_mesh` take of the videos: every axis but the tensor axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["context"]


def _on_devices(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: constrain(x, ROWS), tree)


class Scores:
    """All scorers on one batch of videos; built once, called for every batch.

    A scorer that is not jittable gets numpy arrays on the host, and the device waits for it.
    """

    def __init__(
        self, rewards: Sequence[Reward], weights: Weights, num_frames: int, frames: Sequence[int], microbatch: int = 0
    ) -> None:
        """Builds the function of every scorer.

        Args:
          rewards: the scorers.
          weights: on a mesh.
          num_frames: of a whole video.
          frames: those of a whole video that the batches will hold, ascending.
          microbatch: as in `score_function`.
        """
        self.rewards, self._weights = tuple(rewards), weights
        at = {frame: place for place, frame in enumerate(frames)}
        self._score: list[ScoreFunction] = []
        for reward in self.rewards:
            places = tuple(at[i] for i in reward.frame_indices(num_frames))
            made = score_function(reward, places, microbatch) if reward.jittable else partial(_on_hosts, reward, places)
            self._score.append(made)

    def __call__(self, videos: jax.Array, prompts: Sequence[str]) -> jax.Array:
        """float32 [P * N, D], the scorers' dimensions side by side.

        Args:
          videos: uint8 [P * N, f, H, W, 3], the frames given at construction; a prompt's N candidates side by side.
          prompts: P of them.
        """
        with jax.set_mesh(self._weights.mesh):
            videos = bring(videos, self._weights.mesh)
            columns = [
                score(self._weights(reward), videos, reward.prepare(prompts))
                for reward, score in zip(self.rewards, self._score, strict=True)
            ]
            return jnp.concatenate([jnp.asarray(column, jnp.float32) for column in columns], axis=-1)


def _on_hosts(reward: Reward, places: Sequence[int], params: PyTree, videos: Videos, prepared: PyTree) -> np.ndarray:
    """Each process scores its share of the videos, once; all get the scores of all: [P * N, D]."""
    whole = fetch(videos)
    prepared = jax.tree.map(np.asarray, prepared)
    prompts = _rows(prepared, len(whole))
    # Whole prompts where each process gets as many of them, else videos.
    groups = prompts if prompts % jax.process_count() == 0 else len(whole)
    mine = share(whole.reshape(groups, -1, *whole.shape[1:]))  # [g, n, f, H, W, 3]
    rows = jax.tree.map(share, repeat_rows(prepared, groups))
    scores = np.asarray(reward.score(params, _frames(mine.reshape(-1, *whole.shape[1:]), places), rows), np.float32)
    return unshare(scores.reshape(*mine.shape[:2], -1), groups).reshape(len(whole), -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """A scorer as a function of whole videos: `scorer(videos, prompts)`.

    Attributes:
      reward: the scorer.
      score: as `score_function` makes it; the frames are the scorer's own.
      params: what `score` takes.
      devices: that share each batch.
    """

    reward: Reward
    score: ScoreFunction
    params: PyTree
    devices: int = 1

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
        most = -(-len(videos) // self.devices) * self.devices
        batch = min(getattr(self.reward, "videos_at_a_time", _BATCH) * self.devices, most)
        parts = []
        for start in range(0, len(videos), batch):
            # The last batch is filled up with videos that are not returned: one shape, one compilation.
            rows = np.minimum(np.arange(start, start + batch), len(videos) - 1)
            some = jax.tree.map(lambda x, rows=rows: x[rows], prepared)
            scores = np.asarray(self.score(self.params, videos[rows][:, frames], some))
            parts.append(scores[: len(videos) - start])
        table = np.concatenate(parts).astype(np.float32)
        return {name: table[:, i] for i, name in enumerate(self.reward.dimensions)}


def make_scorer(reward: Reward, mesh: Mesh | None = None) -> Scorer:
    """A scorer as a function; on a mesh its weights are sharded by the rules, and each device scores its videos."""
    if not reward.jittable:
        return Scorer(reward, reward.score, reward.params)
    score = score_function(reward)
    if mesh is None:
        # Else every call would copy the weights from the host, which a CPU does not.
        params = reward.params if jax.default_backend() == "cpu" else jax.device_put(reward.params)
        return Scorer(reward, score, params)

    def on_mesh(params: PyTree, videos: Videos, prepared: PyTree) -> Videos:
        with jax.set_mesh(mesh):
            return score(params, videos, prepared)

    return Scorer(reward, on_mesh, Weights(mesh)(reward), mesh.size)
