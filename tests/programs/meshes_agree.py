"""Takes a training step on one device and on meshes of the kind `argv[1]` and prints the differences, as JSON."""

import json
import sys

import jax
import numpy as np
from vpo_jax.training.stages import Stages
from vpo_jax.training.step import make_gradients

from tests.training import conftest as tiny
from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig
from vpo_jax.runtime.mesh import Meshes, make_mesh, make_meshes

# Every kind of layer of the real denoiser: what the axes cut differs from one to the next.
UNET = UNet3DConditionModel(
    UNet3DConfig.from_dict(
        {
            "in_channels": 4,
            "out_channels": 4,
            "sample_size": 4,
            "block_out_channels": [8],
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "norm_num_groups": 4,
            "cross_attention_dim": 8,
            "down_block_types": ["DownBlock3D"],
            "up_block_types": ["UpBlock3D"],
        }
    )
)


def step(meshes, rank, chunk, unet):
    meshes = meshes if isinstance(meshes, Meshes) else Meshes.of(meshes)
    config = tiny.make_config(lora__rank=rank, rollout__microbatch=4 * chunk, train__microbatch=chunk)
    with jax.set_mesh(meshes.update):
        stages = Stages(config, tiny.make_pipeline(unet), [tiny.ToyReward()], meshes)
        state = stages.fresh_state()
        prompts = [tiny.PROMPTS[i % 5] for i in range(8)]
        text = stages.encode(prompts)
        latents = stages.sample(state.policy, text, 0)
        videos = stages._decode_all(stages._vae_params, latents)
        scores = stages.score(latents, prompts)
        state, _metrics = stages.pair(state, latents, text, scores)
        pairs, update = state.buffer, stages._update
        noised = update.draw(pairs, stages.empty_text, 0, 0)
        theta, _ = update.errors(stages.frozen, state.policy, noised)
        phi, first = update.errors(stages.frozen, state.reference, noised)
        coefficients, loss, _ = update.weigh(pairs, theta, phi)
        gradients = jax.jit(make_gradients(stages.policy.denoise, config.train.microbatch))
        gradient, _ = gradients(stages.frozen, state.policy, first, noised, coefficients, pairs.mask)
        state, _ = stages.update(state, 0, False)
        sharded = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves((state.policy, state.optimizer)))
        latents_spread = len(latents.sharding.device_set)
        caches = (update.errors._cache_size(), update.descend._cache_size())
        second, _ = stages.update(state, 1, False)
        assert caches == (update.errors._cache_size(), update.descend._cache_size()) == (1, 1), caches
        out = {
            "latents": latents,
            "videos": videos,
            "scores": scores,
            "mask": pairs.mask,
            "winner": pairs.winner,
            "loss": loss,
            "gradient": jax.flatten_util.ravel_pytree(jax.device_get(gradient))[0],
            "policy": jax.flatten_util.ravel_pytree(jax.device_get(second.policy))[0],
        }
        return jax.device_get(out), sharded, latents_spread


kind = sys.argv[1]
# Weights cut for the update, gathered once to sample, which cuts frames instead; decoded and scored on a third cut.
axes = {"data": 4, "fsdp": 2, "context": 1, "tensor": 1, "rollout": "data=4,context=2", "score": "fsdp=4"}
meshes = {
    "lora": [("data", make_mesh(8), 0)],
    "full": [("roles", make_meshes(axes), 0), ("chunks", make_mesh(2, 2, devices=jax.devices()[:4]), 4)],
    "denoiser": [("together", make_mesh(1, 2, 2, 2), 0)],
    "axis": [("context", make_mesh(1, 1, 4, devices=jax.devices()[:4]), 0), ("tensor", make_mesh(4, 1, 1, 2), 0)],
}[kind]
rank, unet = (0 if kind == "full" else 2), (UNET if kind in ("denoiser", "axis") else None)
one, _, _ = step(make_mesh(1, devices=jax.devices()[:1]), rank, 0, unet)
found = {}
for name, mesh, chunk in meshes:
    many, sharded, spread = step(mesh, rank, chunk, unet)
    found[name] = {
        "sharded": sharded,
        "spread": spread,
        "latents": float(np.abs(one["latents"] - many["latents"]).max()),
        "levels": int(np.abs(one["videos"].astype(int) - many["videos"]).max()),
        "changed": float((one["videos"] != many["videos"]).mean()),
        "scores": float(np.abs(one["scores"] - many["scores"]).max()),
        "pairs": bool((one["mask"] == many["mask"]).all()),
        "winner": float(np.abs(one["winner"] - many["winner"]).max()),
        "gradient": float(np.linalg.norm(one["gradient"] - many["gradient"]) / np.linalg.norm(one["gradient"])),
        "policy": float(np.abs(one["policy"] - many["policy"]).max()),
        "loss": float(many["loss"]),
    }
print(json.dumps(found))
