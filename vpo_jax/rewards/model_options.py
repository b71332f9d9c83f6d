"""What the scorers that are language models, VideoScore and VideoReward, have in common."""

import dataclasses

import jax
import jax.numpy as jnp

from vpo_jax.models.attention import BACKENDS
from vpo_jax.models.config_fields import require
from vpo_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """How such a scorer is run.

    Attributes:
      query_prompt: a file with what it is asked, `{text_prompt}` where the video's prompt goes; "" takes
        query_prompt.txt of the scorer's folder, and without one words of our own.
      max_prompt_tokens: longer prompts are cut; every text is padded to this, so that nothing is compiled twice.
      frames_at_a_time: frames of each clip in the vision encoder at once.
      clips_at_a_time: clips of a batch when it is called by itself; a rollout has `rollout.microbatch`.
      dtype: "float32" or "bfloat16" of weights and computation; "" takes what is stored.
      attention: a name in `models.attention.BACKENDS`; "cudnn" is for NVIDIA GPUs and bfloat16.
    """

    query_prompt: str = ""
    max_prompt_tokens: int = 128
    frames_at_a_time: int = 4
    clips_at_a_time: int = 4
    dtype: str = ""
    attention: str = "xla"


def check_attention(name: str, attention: str, dtype: jnp.dtype) -> None:
    """Raises UserError for an attention that is unknown, or that cannot compute in this dtype on these devices."""
    field = f"{name}.attention"
    require(attention in BACKENDS, field, f"{attention!r} is not one of {', '.join(BACKENDS)}")
    if attention == "cudnn":
        kind = jax.devices()[0].platform
        require(kind == "gpu", field, f"cudnn wants an NVIDIA GPU and found {kind}; take xla")
        require(dtype.itemsize == 2, field, f"cudnn wants bfloat16 weights and found {dtype}; take xla")


def check_videos(videos: jax.Array, prompts: int) -> None:
    """Raises UserError for anything but uint8 [B, f, H, W, 3] with as many videos for each of the prompts."""
    if videos.ndim != 5 or videos.shape[-1] != 3 or videos.dtype != jnp.uint8 or 0 in videos.shape:
        raise UserError(f"videos: must be uint8 [B, f, H, W, 3], found {videos.dtype} {list(videos.shape)}")
    if len(videos) % prompts:
        raise UserError(f"prompts: {prompts} for {len(videos)} videos; give each as many videos as the others")
