"""The converter of pickles, run as people run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vpo_jax.checkpoints.safetensors_io import read_file, read_weights
from vpo_jax.families.table import read_pipeline

torch = pytest.importorskip("torch")

TOOL = Path(__file__).resolve().parents[2] / "tools" / "pickle_to_safetensors.py"


def convert(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


def test_a_folder_of_pickles_becomes_one_that_loads(broken, parts):
    names = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    for name, stem in names.items():
        file = broken / name / f"{stem}.safetensors"
        state = {key: torch.from_numpy(array.copy()) for key, array in read_file(file).items()}
        file.unlink()
        old = "pytorch_model" if stem == "model" else stem
        if name == "vae":
            half = len(state) // 2
            shards = {f"{old}-0000{i}-of-00002.bin": dict(part) for i, part in enumerate(
                (list(state.items())[:half], list(state.items())[half:]), 1
            )}  # fmt: skip
            for shard, tensors in shards.items():
                torch.save(tensors, broken / name / shard)
            weight_map = {key: shard for shard, tensors in shards.items() for key in tensors}
            (broken / name / f"{old}.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        else:
            torch.save(state, broken / name / f"{old}.bin")
    done = convert(broken)
    assert done.returncode == 0, done.stderr
    assert jax.tree.all(jax.tree.map(np.array_equal, read_pipeline(broken).params, parts.params))


def test_a_training_checkpoint_gives_its_weights(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"epoch": 3, "state_dict": {"a": shared.T, "b": shared, "n": 5}}, tmp_path / "last.ckpt")
    assert convert(tmp_path / "last.ckpt", tmp_path / "model.safetensors").returncode == 0
    state = read_weights(tmp_path, "model")
    np.testing.assert_array_equal(state["a"], shared.numpy().T)
    np.testing.assert_array_equal(state["b"], shared.numpy())


class Evil:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path):
    torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / "evil.bin")
    done = convert(tmp_path)
    assert done.returncode == 2
    assert "cannot be opened as weights alone" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["evil.bin"]


@pytest.mark.parametrize("name", ["missing", "."])
def test_nothing_to_convert_is_an_error(tmp_path, name):
    done = convert(tmp_path / name)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
