"""Takes a training step on one device and on meshes of the kind `argv[1]` and prints the differences, as JSON."""

import json
import sys

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from tests.training import conftest as tiny
from vpo_jax.algorithms.dpo.update import make_gradients
from vpo_jax.checkpoints.keys import init_shapes
from vpo_jax.families.wan.family import Wan
from vpo_jax.models.unet3d import UNet3DConditionModel, UNet3DConfig
from vpo_jax.pipeline import Pipeline
from vpo_jax.recipes import base_wan
from vpo_jax.recipes.tokenizer import make_umt5_tokenizer
from vpo_jax.rewards.scoring import bring
from vpo_jax.runtime.mesh import Meshes, infer_shardings, make_mesh, make_meshes
from vpo_jax.runtime.processes import place
from vpo_jax.training.programs import decode_program
from vpo_jax.training.setup import make_setup

# Every kind of layer of the real denoiser: what the axes shard differs from one to the next.
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
PROMPTS = [tiny.PROMPTS[i % 5] for i in range(8)]


def make_wan():
    """The recipe's small Wan with random weights, and tokens of single frames, which `mesh.context` can divide."""
    configs = base_wan.configs_of(base_wan.VAE)
    configs["transformer"] = {**configs["transformer"], "patch_size": [1, 2, 2]}
    family = Wan.from_configs(configs)
    params = base_wan.init(jax.random.key(0), family)
    video = jax.ShapeDtypeStruct((1, 1, 8, 8, 3), np.float32)
    rng = np.random.default_rng(7)

    def draw(leaf):  # kernels by their inputs; biases and gains around one
        wide = leaf.ndim > 1 and leaf.shape[-1] > 1
        scale = (leaf.size // leaf.shape[-1]) ** -0.5 if wide else 0.3
        return (rng.normal(size=leaf.shape, scale=scale) + (0 if wide else 0.5)).astype(np.float32)

    params["vae"] = jax.tree.map(draw, init_shapes(family.vae, video))
    return Pipeline(family, jax.device_get(params), configs, make_umt5_tokenizer(), base_wan.DEFAULTS)


def decode_every_frame(config, pipeline, programs, meshes, latents):
    """uint8 [B, F, H, W, 3], where scorers read only some frames."""
    vae, frames = pipeline.decoder_params, range(programs.num_frames)
    params = place(vae, infer_shardings(vae, meshes.score, pipeline.family.sharding_rules))
    decode = decode_program(pipeline, frames, programs.latents, len(latents), config.rollout.microbatch)
    with jax.set_mesh(meshes.score):
        return decode.function(params, bring(latents, meshes.score))


def make_step(pipeline, meshes, rank, chunk, pairs, **sizes):
    """(arrays of one step, how many leaves of the state are sharded, devices that hold the latents)."""
    meshes = meshes if isinstance(meshes, Meshes) else Meshes.of(meshes)
    config = tiny.make_config(
        lora__rank=rank, rollout__microbatch=4 * chunk, train__microbatch=chunk, preference__pairs=pairs,
        data__shuffle=False, **sizes,
    )  # fmt: skip
    with jax.set_mesh(meshes.update):
        setup = make_setup(config, pipeline, [tiny.ToyReward()], meshes, PROMPTS)
        state, dpo, frozen = setup.fresh_state(), setup.algorithm, setup.frozen
        candidates = setup.rollouts.next(state, 0)
        assert candidates.prompts == PROMPTS
        latents = candidates.rollout.latents
        videos = decode_every_frame(config, pipeline, setup.programs, meshes, latents)
        scores = setup.score(candidates)
        state, _ = dpo.select(state, candidates.rollout, scores)
        groups = state.algorithm.buffer
        noised = dpo.draw(groups, frozen.empty_text, 0, 0)
        theta, _ = dpo.errors(frozen.backbone, state.policy, noised)
        phi, first = dpo.errors(frozen.backbone, state.reference, noised)
        weighed, _ = dpo.weigh(groups, theta, phi, None)
        gradients = jax.jit(make_gradients(setup.policy.denoise, 2 * config.train.microbatch))
        gradient, _ = gradients(frozen.backbone, state.policy, first, noised, weighed)
        state, _ = dpo.update(state, frozen, 0)
        sharded = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves((state.policy, state.optimizer)))
        spread = len(latents.sharding.device_set)
        caches = (dpo.errors._cache_size(), dpo.descend._cache_size())
        second, _ = dpo.update(state, frozen, 1)
        assert caches == (dpo.errors._cache_size(), dpo.descend._cache_size()) == (1, 1), caches
        out = {
            "latents": latents,
            "videos": videos,
            "scores": scores,
            "mask": groups.mask,
            "learnt": groups.learnt,
            "chosen": groups.latents,
            "loss": weighed.loss,
            "gradient": ravel_pytree(jax.device_get(gradient))[0],
            "policy": ravel_pytree(jax.device_get(second.policy))[0],
        }
        return jax.device_get(out), sharded, spread


def compare(one, many):
    """Largest differences, and the gradient's relative to its norm."""

    def largest(name):
        return float(np.abs(one[name] - many[name]).max())

    norm = np.linalg.norm(one["gradient"])
    return {
        "latents": largest("latents"),
        "levels": int(np.abs(one["videos"].astype(int) - many["videos"]).max()),
        "changed": float((one["videos"] != many["videos"]).mean()),
        "scores": largest("scores"),
        "pairs": bool((one["mask"] == many["mask"]).all() and (one["learnt"] == many["learnt"]).all()),
        "chosen": largest("chosen"),
        "gradient": float(np.linalg.norm(one["gradient"] - many["gradient"]) / norm),
        "policy": largest("policy"),
        "loss": float(many["loss"]),
    }


def main(kind):
    """Prints the differences of each mesh of this kind."""
    # Weights sharded for the update, gathered once to sample, which shards frames instead; scored on a third mesh.
    axes = {"data": 4, "fsdp": 2, "context": 1, "tensor": 1, "rollout": "data=4,context=2", "score": "fsdp=4"}
    chunks = ("chunks", make_mesh(2, 2, devices=jax.devices()[:4]), 4)
    meshes = {
        "lora": [("data", make_mesh(8), 0)],
        "full": [("roles", make_meshes(axes), 0), chunks],
        "group": [("data", make_mesh(8), 0), chunks],
        "trunk": [("roles", make_meshes(axes), 0), chunks],
        "denoiser": [("together", make_mesh(1, 2, 2, 2), 0)],
        "axis": [
            ("context", make_mesh(1, 1, 4, devices=jax.devices()[:4]), 0),
            ("tensor", make_mesh(4, 1, 1, 2), 0),
        ],
        # Three latent frames, which context does not divide, and twelve tokens, which it does.
        "wan": [("together", make_mesh(1, 2, 2, 2), 0), ("roles", make_meshes(axes), 0)],
    }[kind]
    rank, sizes = (0 if kind == "full" else 2), {}
    if kind == "trunk":
        sizes = {"rollout__trunk_level": 0.5, "rollout__num_inference_steps": 4}
    if kind == "wan":
        pipeline = make_wan()
        sizes = {"rollout__num_frames": 5, "rollout__height": 16, "rollout__width": 16}
    else:
        pipeline = tiny.make_pipeline(UNET if kind in ("denoiser", "axis") else None)
    pairs = "group" if kind == "group" else "best_worst"
    one, _, _ = make_step(pipeline, make_mesh(1, devices=jax.devices()[:1]), rank, 0, pairs, **sizes)
    found = {}
    for name, mesh, chunk in meshes:
        many, sharded, spread = make_step(pipeline, mesh, rank, chunk, pairs, **sizes)
        found[name] = {"sharded": sharded, "spread": spread, **compare(one, many)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
