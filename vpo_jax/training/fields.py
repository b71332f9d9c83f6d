"""What each field of a config may hold."""

from collections.abc import Mapping

from vpo_jax.algorithms.table import ALGORITHMS
from vpo_jax.models.attention import BACKENDS
from vpo_jax.rewards.options import Limits, config_limits
from vpo_jax.rewards.table import SCORERS
from vpo_jax.runtime.fields import DECAY, FLAG, POSITIVE, TEXT, Field, above, named, number, one_of, whole
from vpo_jax.runtime.keys import SEED_BITS

_AXIS = Field(int, lambda x: x == -1 or x >= 1, "a number from 1 up, or -1 for the rest of the devices")
_SIZE = whole(0, extra=" (0 = what the model was made for)")
_EVERY = whole(0, extra=" (0 = never)")


def _of_option(kind: type, limits: Limits) -> Field:
    """The field of a scorer's option."""
    if kind is bool:
        return FLAG
    if kind is str:
        return one_of(*limits.choices) if limits.choices else TEXT
    if kind is int:
        return whole(0 if limits.low is None else int(limits.low))
    return above(0.0 if limits.above is None else limits.above)


def _fields_of_scorers() -> dict[str, Field]:
    """reward.NAME.*, as the scorers' `Options` say."""
    fields = {}
    for name, entry in SCORERS.items():
        if entry.options is not None:
            fields[f"reward.{name}.path"] = TEXT
            options = config_limits(entry.options).items()
            fields |= {f"reward.{name}.{key}": _of_option(kind, limits) for key, (kind, limits) in options}
    return fields


FIELDS: Mapping[str, Field] = {
    "seed": whole(0, bits=SEED_BITS),
    "model.path": named("a diffusers folder, a hub id, or shapes"),
    "model.dtype": one_of("float32", "bfloat16"),
    "model.attention": one_of(*BACKENDS),
    "data.prompts": named("a file of prompts, or shapes:train"),
    "data.held_out": TEXT,
    "data.shuffle": FLAG,
    "data.text_cache": TEXT,
    "reward.scorers": named("at least one scorer, comma-separated"),
    "reward.weights": TEXT,
    "reward.offload": FLAG,
    "reward.devices": whole(0, extra=" (0 = all devices do everything)"),
    "reward.timeout": number(0, 1e8, extra=" seconds (0 = no limit)"),
    **_fields_of_scorers(),
    "held_out.scorers": TEXT,
    "algorithm.name": Field(str, lambda x: x in ALGORITHMS, f"one of {', '.join(ALGORITHMS)}"),
    **{key: field for entry in ALGORITHMS.values() for key, field in entry.fields.items()},
    "rollout.candidates": whole(1),
    "rollout.trunk_level": number(0, 1, extra=" (0 = independent candidates)"),
    "rollout.num_inference_steps": whole(1),
    "rollout.guidance_scale": number(0),
    "rollout.guidance_scale_2": number(0, extra=" (0 = guidance_scale)"),
    "rollout.guidance_rescale": number(0, 1),
    "rollout.shift": number(0, extra=" (0 = the checkpoint's)"),
    "rollout.negative_prompt": TEXT,
    "rollout.num_frames": _SIZE,
    "rollout.height": _SIZE,
    "rollout.width": _SIZE,
    "rollout.sampler": TEXT,
    "rollout.eta": number(0, 1),
    "rollout.microbatch": whole(0, extra=" (0 = all at once)"),
    "reference.schedule": one_of("frozen", "refresh", "ema", "adaptive"),
    "reference.every": whole(1),
    "reference.decay": DECAY,
    "ema.decay": DECAY,
    "ema.extrapolation": POSITIVE,
    "lora.rank": whole(0, extra=" (0 = full fine-tuning)"),
    "lora.alpha": POSITIVE,
    "lora.targets": TEXT,
    "lora.path": TEXT,
    "lora.merge": FLAG,
    "optimizer.learning_rate": POSITIVE,
    "optimizer.warmup_steps": whole(0),
    "optimizer.weight_decay": number(0),
    "optimizer.b1": DECAY,
    "optimizer.b2": DECAY,
    "optimizer.eps": POSITIVE,
    "optimizer.clip_norm": number(0, extra=" (0 = no clipping)"),
    "train.steps": whole(1),
    "train.prompts_per_step": whole(1),
    "train.updates_per_step": whole(1),
    "train.microbatch": whole(0, extra=" (0 = the whole batch)"),
    "train.remat": FLAG,
    "checkpoint.every": _EVERY,
    "checkpoint.keep": whole(1),
    "eval.every": _EVERY,
    "eval.on_alarm": one_of("warn", "stop"),
    "eval.prompts": whole(1),
    "eval.seed": whole(0, bits=SEED_BITS),
    "eval.num_inference_steps": whole(0, extra=" (0 = rollout's)"),
    "eval.guidance_scale": number(0, extra=" (0 = rollout's)"),
    "eval.shift": number(0, extra=" (0 = rollout's)"),
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.context": _AXIS,
    "mesh.tensor": _AXIS,
    "mesh.rollout": TEXT,
    "mesh.score": TEXT,
    "mesh.cpu_devices": whole(0, extra=" (0 = by the number of cores)"),
    "profile.steps": TEXT,
    "log.every": whole(1),
    "log.tensorboard": FLAG,
    "log.samples": whole(0),
}
