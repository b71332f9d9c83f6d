"""The family of docs/extending.md: one class and one line of the table, from a folder to training and back."""

import jax
import numpy as np
import pytest

from tests.extending.toy_family import COMPONENTS, ToyFamily
from tests.running import lines
from tests.training.conftest import SCHEDULER, make_config, run_training
from vpo_jax import load_pipeline
from vpo_jax.checkpoints.folders import PipelineParts, shapes_of_configs, write_pipeline
from vpo_jax.families.table import FAMILIES


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A model of the family with random weights, on disk."""
    monkeypatch.setitem(FAMILIES, "ToyPipeline", ToyFamily)
    configs = {name: {"width": 16} for name in COMPONENTS} | {"scheduler": SCHEDULER}
    rng = np.random.default_rng(3)
    shapes = shapes_of_configs(ToyFamily.layout, configs).params
    params = jax.tree.map(lambda leaf: rng.normal(0.0, 0.3, leaf.shape).astype(np.float32), shapes)
    write_pipeline(tmp_path / "model", PipelineParts(ToyFamily.layout, configs, params, None))
    return tmp_path / "model"


def test_a_folder_of_the_family_is_loaded_samples_videos_and_is_written_again(folder, tmp_path):
    pipe = load_pipeline(folder)
    videos = pipe(["a ball", "a cube"], num_inference_steps=2)
    assert videos.shape == (2, 4, 8, 8, 3) and videos.dtype == np.uint8
    assert (videos[0] != videos[1]).any()
    pipe.save_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(
        load_pipeline(tmp_path / "again")(["a ball", "a cube"], num_inference_steps=2), videos
    )


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])
def test_the_family_trains_and_its_other_components_stay(folder, tmp_path, rank):
    pipe = load_pipeline(folder)
    config = make_config(train__steps=1, rollout__height=8, rollout__width=8, lora__rank=rank, train__remat=True)
    result = run_training(config, tmp_path / "run", pipeline=pipe)
    (line,) = lines(tmp_path / "run")
    assert line["loss/applied"] == 1.0
    tuned = result.pipeline
    for name in COMPONENTS:
        same = jax.tree.all(jax.tree.map(np.array_equal, tuned.params[name], pipe.params[name]))
        assert same == (name != "transformer"), name
