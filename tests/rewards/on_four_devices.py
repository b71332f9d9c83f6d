"""Scores of one device and of four: `python on_four_devices.py` prints a JSON object for `test_scoring.py`."""

import json

import jax
import numpy as np

from tests.toy_scorer import ToyScorer
from vpo_jax.planning.compiled import collectives_of
from vpo_jax.rewards.scoring import Scores, Weights, score_function
from vpo_jax.runtime.mesh import batch_sharding, make_mesh

PROMPTS = ["a", "b c", "d e f", "g h i j"]


def main() -> None:
    """Prints, for each microbatch, the rows of videos and prompts in a program, its collectives and its error."""
    videos = np.random.default_rng(0).integers(0, 256, (16, 2, 8, 8, 3), np.uint8)
    alone = make_mesh(1, devices=jax.devices()[:1])
    found = {}
    for microbatch in (0, 4, 8):
        toy = ToyScorer()
        expected = Scores([toy], Weights(alone), 2, (0, 1))(jax.numpy.asarray(videos), PROMPTS)
        mesh = make_mesh(4)
        toy.traced.clear()
        scores = Scores([toy], Weights(mesh), 2, (0, 1), microbatch)(jax.numpy.asarray(videos), PROMPTS)
        (traced,) = toy.traced
        with jax.set_mesh(mesh):
            spread = jax.device_put(videos, batch_sharding(mesh))
            lowered = score_function(toy, None, microbatch).lower(toy.params, spread, toy.prepare(PROMPTS))
            text = lowered.compile().as_text()
        found[microbatch] = {
            "traced": traced,
            "collectives": collectives_of(text),
            "apart": float(np.abs(np.asarray(scores) - np.asarray(expected)).max()),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
