"""The tiny model, its config and its scorer are those of the tests of training."""

from tests.training.conftest import configure, pipeline, pipeline_of, run, toy_reward

__all__ = ["configure", "pipeline", "pipeline_of", "run", "toy_reward"]
