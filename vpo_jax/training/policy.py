"""The denoiser with the part that trains set apart: adapters on a frozen backbone, or all of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from vpo_jax.checkpoints.peft import read_adapter
from vpo_jax.models.lora import ATTENTION_TARGETS, LoRAConfig, init_lora, merge_lora
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.keys import stream_key
from vpo_jax.runtime.trees import cast_floating

Tree = Any
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Policy:
    """How adapters become predictions. Policy, reference and start differ in nothing but the adapters.

    Attributes:
      unet: linen module, (latents [B, F, h, w, C], timesteps [B], text [B, L, D]) -> prediction.
      lora: of the adapters; None for full fine-tuning, where "adapters" are all parameters.
      frozen: the backbone in the compute dtype; {} for full fine-tuning.
      initial: theta0 in float32.
      fold: whether every program folds the adapters into kernels before it uses them. The gradients are the same.
    """

    unet: Any
    lora: LoRAConfig | None
    frozen: Tree
    initial: Tree
    fold: bool = False

    def variables(self, frozen: Tree, adapters: Tree) -> Tree:
        """What the module's `apply` takes."""
        if self.lora is None:
            return {"params": adapters}
        if self.fold:
            return {"params": merge_lora(frozen, adapters, self.lora.scale)}
        return {"params": frozen, "lora": adapters}

    def denoise(
        self, frozen: Tree, adapters: Tree, latents: jax.Array, timesteps: jax.Array, text: jax.Array
    ) -> jax.Array:
        """Prediction [B, F, h, w, C] in float32."""
        return self.unet.apply(self.variables(frozen, adapters), latents, timesteps, text).astype(jnp.float32)

    def in_float32(self) -> "Policy":
        """The same policy, computed in float32."""
        return dataclasses.replace(self, unet=self.unet.clone(dtype=jnp.float32))

    def extrapolated(self, start: Tree, adapters: Tree, factor: float) -> Tree:
        """Adapters that change the start `factor` times as much as these do (ExPO, arXiv 2404.16792).

        An average over a run that wanders round its aim points the right way and not far enough. For LoRA the change
        is A B, and B is multiplied: the adapters are to have begun as fresh ones.
        """
        if factor == 1.0:
            return adapters
        if self.lora is None:
            return jax.tree.map(lambda a, b: a + factor * (b - a), start, adapters)
        return jax.tree.map_with_path(lambda path, x: factor * x if path[-1].key == "lora_B" else x, adapters)

    def merged(self, params: Tree, adapters: Tree) -> Tree:
        """Parameters of the plain model; `params` is the untouched backbone in its own precision."""
        return adapters if self.lora is None else merge_lora(params, adapters, self.lora.scale)


def lora_config(config: Any) -> LoRAConfig | None:
    """Rank, alpha and targets of a run's config; None where it trains every weight."""
    if config.lora.rank == 0:
        return None
    targets = tuple(filter(None, (t.strip() for t in config.lora.targets.split(",")))) or ATTENTION_TARGETS
    return LoRAConfig(config.lora.rank, config.lora.alpha, targets)


def read_start(config: Any, params: Tree) -> Tree | None:
    """theta0 of the adapter folder `lora.path`; None where the config names none.

    Raises:
      UserError: it is broken, or of another rank, alpha or other layers than the config's.
    """
    lora = lora_config(config)
    if lora is None or not config.lora.path:
        return None
    shapes = jax.eval_shape(lambda: init_lora(jax.random.key(0), params, lora))
    return read_adapter(config.lora.path, shapes, lora)


def make_policy(config: Any, family: Any, params: Tree, adapters: Tree | None = None) -> Policy:
    """The policy of a config.

    Args:
      config: reads seed, model.dtype, lora.* and train.remat.
      unet: the linen denoiser.
      params: its parameters.
      adapters: theta0 = phi of a run that starts from an adapter; None starts fresh ones, which change nothing.

    Raises:
      UserError: an unknown dtype, a rank below 0, or LoRA targets that match no layer.
    """
    unet = family.unet
    if config.model.dtype not in DTYPES:
        raise UserError(f"model.dtype: {config.model.dtype!r} is not supported; choose float32 or bfloat16")
    dtype = DTYPES[config.model.dtype]
    if config.lora.rank < 0:
        raise UserError(f"lora.rank: {config.lora.rank} is below 0; 0 is full fine-tuning")
    lora = lora_config(config)
    if lora is None:
        return Policy(unet.clone(dtype=dtype, remat=config.train.remat), None, {}, cast_floating(params, jnp.float32))
    start = init_lora(stream_key(config.seed, "init"), params, lora) if adapters is None else adapters
    unet = unet.clone(dtype=dtype, remat=config.train.remat, lora_scale=lora.scale)
    return Policy(unet, lora, cast_floating(params, dtype), start, config.lora.fold)
