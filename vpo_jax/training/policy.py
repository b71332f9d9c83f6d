"""The denoiser as a trainable and a frozen part: adapters on a frozen backbone, or all parameters and nothing."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vpo_jax.checkpoints.peft import read_adapter
from vpo_jax.families.protocol import Family, Text
from vpo_jax.models.lora import LoRAConfig, init_lora, merge_lora
from vpo_jax.pipeline import Pipeline
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.keys import stream_key
from vpo_jax.runtime.programs import abstract
from vpo_jax.runtime.trees import cast_floating

Tree = Any
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Policy:
    """How trainable parameters become predictions. Policy, reference and initial policy differ in nothing else.

    Attributes:
      family: the model, with its options (dtype, rematerialisation, scale of adapters) set.
      lora: of the adapters; None for full fine-tuning.
      frozen: the backbone in the compute dtype; {} for full fine-tuning.
      initial: theta0, the trainable parameters at first, in float32: adapters, or all that the family trains.
      merge: whether every program merges the adapters into the kernels first. The gradients are the same.
    """

    family: Family
    lora: LoRAConfig | None
    frozen: Tree
    initial: Tree
    merge: bool = False

    def variables(self, frozen: Tree, trainable: Tree) -> Tree:
        """What `family.denoise` takes."""
        if self.lora is None:
            return {"params": trainable}
        if self.merge:
            return {"params": merge_lora(frozen, trainable, self.lora.scale)}
        return {"params": frozen, "lora": trainable}

    def denoise(self, frozen: Tree, trainable: Tree, latents: jax.Array, timesteps: jax.Array, text: Text) -> jax.Array:
        """Prediction float32 [B, f, h, w, C] for latents [B, f, h, w, C], timesteps [B] and B prompts' text."""
        return self.family.denoise(self.variables(frozen, trainable), latents, timesteps, text)

    def read_text(self, frozen: Tree, trainable: Tree, text: Text) -> Tree:
        """What `denoise` takes in place of `text`; see `Family.read_text`."""
        return self.family.read_text(self.variables(frozen, trainable), text)

    def in_float32(self) -> "Policy":
        """The same policy, computed in float32, for which cuDNN has no attention."""
        return dataclasses.replace(self, family=self.family.with_options(dtype=jnp.float32, attention="xla"))

    def extrapolated(self, initial: Tree, trainable: Tree, factor: float) -> Tree:
        """Parameters `factor` times as far from the initial ones as these are (ExPO, arXiv 2404.16792).

        The average of a noisy run points in the right direction and does not go far enough. For LoRA the change is A B,
        and B is multiplied, which assumes that the run began with fresh adapters (B = 0).
        """
        if factor == 1.0:
            return trainable
        if self.lora is None:
            return jax.tree.map(lambda a, b: a + factor * (b - a), initial, trainable)
        return jax.tree.map_with_path(lambda path, x: factor * x if path[-1].key == "lora_B" else x, trainable)

    def merged(self, params: Tree, trainable: Tree) -> Tree:
        """Parameters of the plain model; `params` is the untouched backbone in its own precision."""
        return trainable if self.lora is None else merge_lora(params, trainable, self.lora.scale)


def lora_config(config: Any, family: Family) -> LoRAConfig | None:
    """Rank, alpha and targets of a run's config, by default the family's; None where it trains every weight."""
    if config.lora.rank == 0:
        return None
    targets = tuple(filter(None, (t.strip() for t in config.lora.targets.split(",")))) or family.lora_targets
    return LoRAConfig(config.lora.rank, config.lora.alpha, targets)


def read_initial(config: Any, family: Family, params: Tree) -> Tree | None:
    """theta0 of the adapter `lora.path`; None where the config names none.

    Args:
      config: reads lora.*.
      family: whose layers are adapted.
      params: its trainable parameters, or their shapes.

    Raises:
      UserError: it is broken, or of another rank, alpha or other layers than the config's.
    """
    lora = lora_config(config, family)
    if lora is None or not config.lora.path:
        return None
    shapes = jax.eval_shape(lambda: init_lora(jax.random.key(0), params, lora))
    return read_adapter(config.lora.path, shapes, lora, family.original_names, adapted_components(family, shapes))


def adapted_components(family: Family, adapters: Tree) -> tuple[str, ...]:
    """The components that adapters belong to, where the family trains several and the tree is a dict by component."""
    return tuple(name for name in adapters if name in family.layout.components)


def make_policy(config: Any, family: Family, params: Tree, adapters: Tree | None = None) -> Policy:
    """The policy of a config.

    Args:
      config: reads seed, model.dtype, model.attention, lora.* and train.remat.
      family: the model.
      params: its parameters that training changes, as `family.trainable` returns them.
      adapters: theta0 = phi of a run that starts from an adapter; None starts fresh ones, which change nothing.

    Raises:
      UserError: an unknown dtype, a rank below 0, or LoRA targets that match no layer.
    """
    if config.model.dtype not in DTYPES:
        raise UserError(f"model.dtype: {config.model.dtype!r} is not supported; choose float32 or bfloat16")
    dtype = DTYPES[config.model.dtype]
    if config.lora.rank < 0:
        raise UserError(f"lora.rank: {config.lora.rank} is below 0; 0 is full fine-tuning")
    lora = lora_config(config, family)
    if lora is None:
        options = family.with_options(dtype=dtype, remat=config.train.remat, attention=config.model.attention)
        return Policy(options, None, {}, cast_floating(params, jnp.float32))
    initial = init_lora(stream_key(config.seed, "init"), params, lora) if adapters is None else adapters
    family = family.with_options(
        dtype=dtype, remat=config.train.remat, lora_scale=lora.scale, attention=config.model.attention
    )
    frozen = cast_floating(params, dtype, family.float32_parameters)
    return Policy(family, lora, frozen, initial, config.lora.merge)


def text_params(config: Any, family: Family, params: Tree) -> Tree:
    """The text encoder's parameters in the dtype in which a run of this `model.dtype` has them on the devices."""
    dtype = DTYPES[config.model.dtype]
    return cast_floating(params, dtype) if family.half_text and dtype != jnp.float32 else params


def abstract_text_params(config: Any, pipeline: Pipeline) -> Tree:
    """`text_params` as shapes; the pipeline's parameters may be shapes."""
    return jax.eval_shape(partial(text_params, config, pipeline.family), abstract(pipeline.text_params))


def abstract_policy(config: Any, pipeline: Pipeline) -> Policy:
    """The policy of a config as shapes; the pipeline's parameters may be shapes."""
    made: list[Policy] = []

    def trees(params: Tree) -> tuple[Tree, Tree]:
        made.append(make_policy(config, pipeline.family, params))
        return made[0].frozen, made[0].initial

    frozen, initial = jax.eval_shape(trees, abstract(pipeline.trainable))
    return dataclasses.replace(made[0], frozen=frozen, initial=initial)
