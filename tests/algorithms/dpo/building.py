"""Groups, and DPO on the tiny model, for tests."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.training.conftest import ToyReward
from vpo_jax.algorithms.dpo.algorithm import DPO, DPOState
from vpo_jax.algorithms.dpo.selection import Groups
from vpo_jax.algorithms.dpo.update import Weighed
from vpo_jax.algorithms.protocol import Frozen, Setting
from vpo_jax.algorithms.state import init_state
from vpo_jax.families.protocol import Text
from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig
from vpo_jax.training.optimizer import make_optimizer
from vpo_jax.training.policy import make_policy

EMPTY = Text(jnp.zeros((6, 8)))
SHAPE = (4, 4, 4, 4)


def groups_like(mask=(True,) * 4, step=0, size=2, seed=0):
    """Groups of `size` candidates; of two, the first is the winner."""
    rng = np.random.default_rng(seed)
    n = len(mask)
    latents = np.stack(list(rng.normal(size=(size, n, *SHAPE)).astype(np.float32)), axis=1)
    text = rng.normal(size=(n, 6, 8))
    rewards = np.stack([np.linspace(1.0, 2.0, n), -np.ones(n)], axis=1) if size == 2 else rng.normal(size=(n, size))
    return Groups(
        latents=jnp.asarray(latents),
        text=Text(jnp.asarray(text, jnp.float32)),
        rewards=jnp.asarray(rewards, jnp.float32),
        preferred=jnp.asarray(rewards[:, :, None] > rewards[:, None, :]),
        learnt=jnp.ones((n, size), bool),
        mask=jnp.asarray(mask),
        slot=jnp.arange(n, dtype=jnp.int32),
        step=jnp.full(n, step, jnp.int32),
    )


def policy_of(config, pipeline):
    return make_policy(config, pipeline.family, pipeline.trainable)


def levels(pipeline, timesteps):
    """(signal, noise) at timesteps, broadcast over latents."""
    return (np.asarray(table)[..., None, None, None, None] for table in pipeline.process.levels(jnp.asarray(timesteps)))


class Built(NamedTuple):
    policy: object
    frozen: Frozen
    state: object
    dpo: DPO


def build(config, pipeline, groups, denoise=None):
    """DPO on these groups; `denoise` in place of the policy's."""
    policy, optimizer = policy_of(config, pipeline), make_optimizer(config.optimizer)
    frozen = Frozen(policy.frozen, policy.initial, EMPTY)
    setting = Setting(
        config=config,
        denoise=denoise or policy.denoise,
        denoise_float32=denoise or policy.in_float32().denoise,
        process=pipeline.process,
        sampler=None,
        optimizer=optimizer,
        rewards=[ToyReward()],
        latents=jax.ShapeDtypeStruct(SHAPE, jnp.float32),
        text=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), EMPTY),
        frozen=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), frozen),
        rules=pipeline.family.sharding_rules,
    )
    dpo = DPO(setting)
    state = init_state(policy.initial, optimizer, dpo.init, 2, with_ema=config.ema.decay > 0)
    state = state._replace(algorithm=DPOState(groups, groups, jnp.array(False)))
    return Built(policy, frozen, state, dpo)


def apply(built, state=None, number=0):
    # A donated buffer must not be one that the test still reads.
    state = jax.tree.map(lambda x: jnp.array(x, copy=True), built.state if state is None else state)
    return built.dpo.update(state, built.frozen, number)


def with_buffer(state, groups):
    return state._replace(algorithm=state.algorithm._replace(buffer=groups))


def constants(coefficients, mask=None):
    """What a gradient needs: these constants [P, K] and an even share for every candidate that the mask keeps."""
    coefficients = jnp.asarray(coefficients, jnp.float32)
    mask = jnp.ones(len(coefficients), bool) if mask is None else mask
    shares = jnp.broadcast_to(mask[:, None] / coefficients.shape[1], coefficients.shape)
    kept = jnp.sum(mask, dtype=jnp.float32)
    coefficients = jnp.where(mask[:, None], coefficients, 0.0)
    return Weighed(coefficients, shares, kept, jnp.maximum(1.0, kept), jnp.any(mask), jnp.zeros(()))


def pair_constants(winner, loser, mask=None):
    return constants(jnp.stack([winner, -loser], axis=1), mask)


def mean(metrics, name):
    return float(metrics[name][0] / metrics[name][1])


def form(configure, pairs, **overrides):
    """The config of a form that learns from 4 candidates."""
    return configure(
        preference__pairs=pairs, preference__label_temperature=0.5 if pairs == "listwise" else 0.0, **overrides
    )


def unet3d():
    config = UNet3DConfig.from_dict(
        {
            "block_out_channels": [8],
            "down_block_types": ["CrossAttnDownBlock3D"],
            "up_block_types": ["CrossAttnUpBlock3D"],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
        }
    )
    return UNet3DConditionModel(config)
