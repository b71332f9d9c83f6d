"""What a config may hold: looked at before anything is loaded, compiled or written."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vpo_jax.diffusion.samplers import make_sampler
from vpo_jax.models.attention import BACKENDS
from vpo_jax.rewards.combine import parse_weights
from vpo_jax.runtime.cli import flatten_config, nearest
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.keys import SEED_BITS
from vpo_jax.runtime.mesh import Meshes, batch_size, parse_axes
from vpo_jax.training.policy import make_policy


class Field(NamedTuple):
    """A field's type, what its values must hold, and that in words."""

    kind: type
    holds: Callable[[Any], bool]
    words: str


def _whole(low: int, extra: str = "", bits: int = 31) -> Field:
    return Field(int, lambda x: low <= x < 2**bits, f"a whole number from {low} up{extra}, below 2**{bits}")


def _number(low: float, high: float = math.inf, extra: str = "") -> Field:
    upper = f" to {high:g}" if high < math.inf else " up"
    return Field(float, lambda x: low <= x <= high, f"a number from {low:g}{upper}{extra}")


def _one_of(*values: str) -> Field:
    return Field(str, lambda x: x in values, f"one of {', '.join(values)}")


_SEED = _whole(0, bits=SEED_BITS)
_FLAG = Field(bool, lambda x: True, "true or false")
_TEXT = Field(str, lambda x: True, "text")
_AXIS = Field(int, lambda x: x == -1 or x >= 1, "a number from 1 up, or -1 for the rest of the devices")
_SIZE = _whole(0, extra=" (0 = what the model was made for)")
_EVERY = _whole(0, extra=" (0 = never)")
_POSITIVE = Field(float, lambda x: x > 0, "a number above 0")
_DECAY = Field(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")


def _named(what: str) -> Field:
    return Field(str, lambda x: bool(x.strip()), what)


FIELDS: Mapping[str, Field] = {
    "seed": _SEED,
    "model.path": _named("a diffusers folder, a hub id, or shapes"),
    "model.dtype": _one_of("float32", "bfloat16"),
    "data.prompts": _named("a file of prompts, or shapes:train"),
    "data.held_out": _TEXT,
    "data.shuffle": _FLAG,
    "data.text_cache": _TEXT,
    "reward.scorers": _named("at least one scorer, comma-separated"),
    "reward.weights": _TEXT,
    "reward.offload": _FLAG,
    "reward.devices": _whole(0, extra=" (0 = all devices do everything)"),
    "reward.timeout": _number(0, 1e8, extra=" seconds (0 = no limit)"),
    "reward.videoscore.path": _TEXT,
    "reward.videoscore.query_prompt": _TEXT,
    "reward.videoscore.frame_choice": _one_of("arange", "linspace"),
    "reward.videoscore.max_frames": _whole(1),
    "reward.videoscore.attention": _one_of(*BACKENDS),
    "reward.videoreward.path": _TEXT,
    "reward.videoreward.query_prompt": _TEXT,
    "reward.videoreward.video_fps": _POSITIVE,
    "reward.videoreward.attention": _one_of(*BACKENDS),
    "held_out.scorers": _TEXT,
    "rollout.candidates": _whole(2, extra=" (a pair needs two)"),
    "rollout.num_inference_steps": _whole(1),
    "rollout.guidance_scale": _number(0),
    "rollout.guidance_rescale": _number(0, 1),
    "rollout.negative_prompt": _TEXT,
    "rollout.num_frames": _SIZE,
    "rollout.height": _SIZE,
    "rollout.width": _SIZE,
    "rollout.sampler": _TEXT,
    "rollout.eta": _number(0, 1),
    "rollout.microbatch": _whole(0, extra=" (0 = all at once)"),
    "preference.beta": _POSITIVE,
    "preference.margin": _number(0),
    "preference.motion_tolerance": _number(0),
    "preference.label_temperature": _number(0, extra=" (0 = hard labels)"),
    "preference.winner_safeguard": _FLAG,
    "preference.winner_safeguard_mu": _number(0, 1),
    "preference.winner_penalty": _number(0),
    "preference.anchor": _number(0),
    "preference.max_pair_age": _whole(0),
    "preference.caption_dropout": _number(0, 1),
    "preference.timestep_low": _number(0, 1),
    "preference.timestep_high": _number(0, 1),
    "reference.schedule": _one_of("frozen", "refresh", "ema", "adaptive"),
    "reference.every": _whole(1),
    "reference.decay": _DECAY,
    "ema.decay": _DECAY,
    "ema.extrapolation": _POSITIVE,
    "lora.rank": _whole(0, extra=" (0 = full fine-tuning)"),
    "lora.alpha": _POSITIVE,
    "lora.targets": _TEXT,
    "lora.path": _TEXT,
    "lora.fold": _FLAG,
    "optimizer.learning_rate": _POSITIVE,
    "optimizer.warmup_steps": _whole(0),
    "optimizer.weight_decay": _number(0),
    "optimizer.b1": _DECAY,
    "optimizer.b2": _DECAY,
    "optimizer.eps": _POSITIVE,
    "optimizer.clip_norm": _number(0, extra=" (0 = no clipping)"),
    "train.steps": _whole(1),
    "train.prompts_per_step": _whole(1),
    "train.updates_per_step": _whole(1),
    "train.microbatch": _whole(0, extra=" (0 = the whole batch)"),
    "train.remat": _FLAG,
    "checkpoint.every": _EVERY,
    "checkpoint.keep": _whole(1),
    "eval.every": _EVERY,
    "eval.on_alarm": _one_of("warn", "stop"),
    "eval.prompts": _whole(1),
    "eval.seed": _SEED,
    "eval.num_inference_steps": _whole(0, extra=" (0 = rollout's)"),
    "eval.guidance_scale": _number(0, extra=" (0 = rollout's)"),
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.context": _AXIS,
    "mesh.tensor": _AXIS,
    "mesh.rollout": _TEXT,
    "mesh.score": _TEXT,
    "log.every": _whole(1),
    "log.tensorboard": _FLAG,
    "log.samples": _whole(0),
}


def check(config: Mapping[str, Any]) -> None:
    """Raises UserError, naming the field and the fix, for a key or value that no run could have."""
    values = dict(flatten_config(config))
    for key in values:
        if key not in FIELDS:
            raise UserError(f"{key}: unknown config key{nearest(key, list(FIELDS))}")
    for key, field in FIELDS.items():
        if key not in values:
            raise UserError(f"{key}: missing in the config; give {field.words}")
        _check_value(key, values[key], field)
    for key in ("mesh.rollout", "mesh.score"):
        parse_axes(values[key], key)
    if values["reward.devices"] and not values["preference.max_pair_age"]:
        raise UserError(
            "preference.max_pair_age: with reward.devices, candidates are one step old when they are scored;"
            " give 1 or more, or set reward.devices=0"
        )
    microbatch, pairs = values["train.microbatch"], values["train.prompts_per_step"]
    if microbatch and pairs % microbatch:
        raise UserError(
            f"train.microbatch: {microbatch} does not divide train.prompts_per_step={pairs}; choose a divisor"
        )
    if values["lora.path"] and not values["lora.rank"]:
        raise UserError("lora.path: an adapter cannot start full fine-tuning (lora.rank=0); give its rank, or merge it")
    if values["lora.fold"] and values["model.dtype"] != "float32":
        raise UserError("lora.fold: a kernel in bfloat16 would swallow small adapters; set model.dtype to float32")
    if values["lora.fold"] and not values["lora.rank"]:
        raise UserError("lora.fold: full fine-tuning (lora.rank=0) has no adapters to fold; set lora.fold to False")
    low, high = values["preference.timestep_low"], values["preference.timestep_high"]
    if low >= high:
        raise UserError(f"preference.timestep_low: {low} is not below preference.timestep_high={high}; lower it")
    if values["ema.extrapolation"] != 1.0:
        if not values["ema.decay"]:
            raise UserError("ema.extrapolation: there is no average to extrapolate (ema.decay=0); set it to 1.0")
        if values["lora.path"]:
            raise UserError("ema.extrapolation: is of fresh adapters, and lora.path begins from others; set it to 1.0")
    rollout, videos = values["rollout.microbatch"], pairs * values["rollout.candidates"]
    if rollout and videos % rollout:
        raise UserError(
            f"rollout.microbatch: {rollout} does not divide the step's {videos} videos"
            f" (train.prompts_per_step x rollout.candidates); choose a divisor"
        )


def _check_value(key: str, value: Any, field: Field) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    right = is_number if field.kind is float else type(value) is field.kind
    # Compared, since a whole number that no float can hold makes math.isfinite raise.
    finite = field.kind is not float or (right and abs(value) <= sys.float_info.max)
    if not right or not finite or not field.holds(value):
        raise UserError(f"{key}: {value!r} is not {field.words}")


def check_meshes(config: Any, meshes: Meshes) -> None:
    """Raises UserError where a mesh does not divide the batches that are computed on it."""
    prompts = config.train.prompts_per_step
    clips = {
        "rollout.microbatch": config.rollout.microbatch,
        "train.prompts_per_step x rollout.candidates": prompts * config.rollout.candidates,
    }
    pairs = {"train.prompts_per_step": prompts, "train.microbatch": config.train.microbatch}
    for role, mesh, sizes in (
        ("mesh.data x mesh.fsdp", meshes.update, pairs),
        ("mesh.rollout", meshes.rollout, clips),
        ("reward.devices" if config.reward.devices and not config.mesh.score else "mesh.score", meshes.score, clips),
    ):
        parts = batch_size(mesh)
        for key, size in sizes.items():
            if size % parts:
                raise UserError(
                    f"{key}: {size} is not a multiple of {parts}, into which {role} cuts it ({mesh.shape['data']} x"
                    f" {mesh.shape['fsdp']}); choose {-(-size // parts) * parts}, or another mesh"
                )


def check_inputs(config: Any, pipeline: Any, rewards: Sequence[Any], judges: Sequence[Any] = ()) -> None:
    """Raises UserError where the config does not fit the model or the scorers; computes nothing."""
    rollout = config.rollout
    num_frames, height, width = pipeline.video_size(rollout.num_frames, rollout.height, rollout.width)
    make_sampler(pipeline.scheduler_config, rollout.num_inference_steps, rollout.sampler or None, rollout.eta)
    if config.eval.num_inference_steps:
        try:
            make_sampler(pipeline.scheduler_config, config.eval.num_inference_steps, rollout.sampler or None)
        except UserError as error:
            raise UserError(f"eval.{error}") from error
    parse_weights(config.reward.weights, rewards)
    for scorer in (*rewards, *judges):
        frames = scorer.frame_indices(num_frames)
        if scorer.jittable and not scorer.trains:  # it would meet its first video after the training
            videos = jax.ShapeDtypeStruct((1, len(frames), height, width, 3), jnp.uint8)
            jax.eval_shape(scorer.score, scorer.params, videos, scorer.prepare(["a"]))
    jax.eval_shape(lambda: make_policy(config, pipeline.unet, pipeline.params["unet"]).start)
