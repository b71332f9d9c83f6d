"""Checks of a config, before anything is loaded, compiled or written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vpo_jax.algorithms.table import ALGORITHMS
from vpo_jax.diffusion.config import with_shift
from vpo_jax.diffusion.samplers import make_sampler
from vpo_jax.models.attention import check_attention
from vpo_jax.pipeline import SHIPPED, Pipeline
from vpo_jax.rewards.protocol import Reward
from vpo_jax.runtime.backend import copies_on_cores
from vpo_jax.runtime.cli import flatten_config, nearest
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import Meshes, batch_size, parse_axes
from vpo_jax.runtime.paths import weights_bytes
from vpo_jax.runtime.profile import parse_steps
from vpo_jax.training.fields import FIELDS
from vpo_jax.training.policy import DTYPES, Policy, abstract_policy
from vpo_jax.training.programs import make_programs


def check(config: Mapping[str, Any]) -> None:
    """Raises UserError, naming the field and the fix, for a key or value that no run could have."""
    values = dict(flatten_config(config))
    for key in values:
        if key not in FIELDS:
            raise UserError(f"{key}: unknown config key{nearest(key, list(FIELDS))}")
    for key, field in FIELDS.items():
        if key not in values:
            raise UserError(f"{key}: missing in the config; give {field.words}")
        field.check(key, values[key])
    for key in ("mesh.rollout", "mesh.score"):
        parse_axes(values[key], key)
    parse_steps(values["profile.steps"])
    ALGORITHMS[values["algorithm.name"]].check(values)
    if values["lora.path"] and not values["lora.rank"]:
        raise UserError("lora.path: an adapter cannot start full fine-tuning (lora.rank=0); give its rank, or merge it")
    if values["lora.merge"] and values["model.dtype"] != "float32":
        raise UserError("lora.merge: a kernel in bfloat16 would round small adapters away; set model.dtype to float32")
    if values["lora.merge"] and not values["lora.rank"]:
        raise UserError("lora.merge: full fine-tuning (lora.rank=0) has no adapters to merge; set lora.merge to False")
    if values["ema.extrapolation"] != 1.0:
        if not values["ema.decay"]:
            raise UserError("ema.extrapolation: there is no average to extrapolate (ema.decay=0); set it to 1.0")
        if values["lora.path"]:
            raise UserError("ema.extrapolation: needs fresh adapters, and lora.path starts from others; set it to 1.0")
    if values["rollout.trunk_level"] and values["rollout.candidates"] < 2:
        raise UserError(
            "rollout.trunk_level: one candidate (rollout.candidates=1) has none to share a trunk with; set it to 0.0"
        )
    rollout, videos = values["rollout.microbatch"], values["train.prompts_per_step"] * values["rollout.candidates"]
    if rollout and videos % rollout:
        raise UserError(
            f"rollout.microbatch: {rollout} does not divide the step's {videos} videos"
            f" (train.prompts_per_step x rollout.candidates); choose a divisor"
        )


def cpu_devices(config: Any) -> int:
    """Into how many devices a run divides a CPU: `mesh.cpu_devices`, or by itself.

    By itself one a core, as far as the step's batches can be divided; 1 where the models are too large for a copy on
    each or of unknown size, and where other fields say more of the mesh.
    """
    mesh, model = config.mesh, Path(SHIPPED.get(config.model.path, config.model.path))
    if mesh.cpu_devices:
        return int(mesh.cpu_devices)
    if mesh.data != -1 or mesh.rollout or mesh.score or config.reward.devices or not model.is_dir():
        return 1
    scorers = [name.strip() for name in f"{config.reward.scorers},{config.held_out.scorers}".split(",")]
    folders = [config.reward[name].path if "path" in config.reward.get(name, {}) else name for name in scorers]
    most = copies_on_cores(weights_bytes([model, *filter(None, folders)]))
    fixed = mesh.fsdp * mesh.context * mesh.tensor
    videos, pairs = _batches(config)
    sizes = [size for size in (videos | pairs).values() if size]
    return max((n for n in range(1, most + 1) if n % fixed == 0 and not any(size % n for size in sizes)), default=1)


def _batches(config: Any) -> tuple[dict[str, int], dict[str, int]]:
    """The sizes of batches that devices divide among them, by the fields that say them: of rollouts, of updates."""
    prompts = config.train.prompts_per_step
    videos = {
        "rollout.microbatch": config.rollout.microbatch,
        "train.prompts_per_step x rollout.candidates": prompts * config.rollout.candidates,
    }
    return videos, {"train.prompts_per_step": prompts, "train.microbatch": config.train.microbatch}


def check_meshes(config: Any, meshes: Meshes) -> None:
    """Raises UserError where a mesh does not divide the batches that are computed on it."""
    videos, pairs = _batches(config)
    prompts = config.train.prompts_per_step
    # A trunk a prompt is sampled where candidates are.
    trunks = {"train.prompts_per_step": prompts} if config.rollout.trunk_level else {}
    for role, mesh, sizes in (
        ("mesh.data x mesh.fsdp", meshes.update, pairs),
        ("mesh.rollout", meshes.rollout, videos | trunks),
        ("reward.devices" if config.reward.devices and not config.mesh.score else "mesh.score", meshes.score, videos),
    ):
        parts = batch_size(mesh)
        for key, size in sizes.items():
            if size % parts:
                raise UserError(
                    f"{key}: {size} is not a multiple of {parts}, into which {role} shards it ({mesh.shape['data']} x"
                    f" {mesh.shape['fsdp']}); choose {-(-size // parts) * parts}, or another mesh"
                )


def check_context(meshes: Meshes, length: int) -> None:
    """Raises UserError where a mesh does not divide what it shards of a video (`Family.context_length`)."""
    for key, mesh in (("mesh.context", meshes.update), ("mesh.rollout", meshes.rollout)):
        if length % mesh.shape["context"]:
            raise UserError(
                f"{key}: context {mesh.shape['context']} does not divide the {length} latent frames or tokens of a"
                f" video of this size (rollout.num_frames); choose a divisor"
            )


def check_inputs(
    config: Any, pipeline: Pipeline, rewards: Sequence[Reward], held_out: Sequence[Reward], meshes: Meshes
) -> Policy:
    """The run's policy as shapes; computes nothing.

    Raises:
      UserError: the config does not fit the model, the scorers or the mesh. Whatever building a run's programs would
        refuse is refused here, before anything is written.
    """
    rollout = config.rollout
    check_attention("model.attention", config.model.attention, DTYPES[config.model.dtype])
    check_meshes(config, meshes)
    num_frames, height, width = pipeline.video_size(rollout.num_frames, rollout.height, rollout.width)
    check_context(meshes, pipeline.family.context_length(num_frames, height, width))
    if config.eval.num_inference_steps or config.eval.shift:
        steps = config.eval.num_inference_steps or rollout.num_inference_steps
        scheduler = with_shift(pipeline.scheduler_config, config.eval.shift, "eval.shift")
        try:
            make_sampler(scheduler, steps, rollout.sampler or None)
        except UserError as error:
            raise UserError(f"eval.{error}") from error
    for scorer in (*rewards, *held_out):
        frames = scorer.frame_indices(num_frames)
        if scorer.jittable and not scorer.trains:  # else it would get its first video after the training
            videos = jax.ShapeDtypeStruct((1, len(frames), height, width, 3), jnp.uint8)
            jax.eval_shape(scorer.score, scorer.params, videos, scorer.prepare(["a"]))
    policy = abstract_policy(config, pipeline)
    make_programs(config, pipeline, policy, rewards)
    return policy
