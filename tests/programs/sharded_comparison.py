"""Evaluates the model folder `argv[1]` with whole and with sharded weights and prints how much they differ, as JSON."""

import json
import sys

import jax
import numpy as np

from vpo_jax.evaluation import compare
from vpo_jax.pipeline import load_pipeline
from vpo_jax.rewards.loading import load_reward

pipeline, reward = load_pipeline(sys.argv[1]), load_reward("shapes")
prompts = ["a red circle moving left on a gray background", "two words", "", "a b c", "x"]
sampling = compare.Sampling(num_frames=4, height=8, width=8, num_inference_steps=2, guidance_scale=2.0)
found = []
for parts in (1, 2):
    compare.shards_needed = lambda *_, parts=parts: parts
    mesh = compare.local_mesh(pipeline.params, [reward])
    weights = jax.tree.leaves(compare.make_scorer(reward, mesh).params)
    cut = sum(not x.sharding.is_fully_replicated for x in weights)
    found.append((dict(mesh.shape), cut, *compare.evaluate(pipeline, prompts, [reward], sampling, keep=5)))
(plain, none, scores, kept), (mesh, cut, others, videos) = found
print(
    json.dumps(
        {
            "meshes": [plain, mesh],
            "cut": [none, cut],
            "levels": int(np.abs(kept.astype(int) - videos).max()),
            "scores": max(float(np.abs(scores[name] - others[name]).max()) for name in scores),
        }
    )
)
