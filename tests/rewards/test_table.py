"""One line of the table makes a scorer known by name, by folder, in a config and to the planner."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.toy_scorer import ToyScorer
from vpo_jax.rewards import table
from vpo_jax.rewards.entry import Entry
from vpo_jax.rewards.loading import abstract_rewards, class_of, load_reward
from vpo_jax.rewards.options import option
from vpo_jax.rewards.protocol import Reward
from vpo_jax.rewards.table import SCORERS
from vpo_jax.runtime.errors import UserError
from vpo_jax.training import fields


@dataclasses.dataclass(frozen=True)
class Options:
    scale: float = option(1.0, above=0.0, in_config=True)
    notes: str = option("", is_file=True, in_config=True)
    hidden: int = option(3, low=1)


def load(folder, name=None, options=None):
    toy = ToyScorer()
    toy.name, toy.params = name or folder, {"scale": np.full((1,), (options or Options()).scale, np.float32)}
    return toy


def abstract(name, options):
    toy = load("", name, options)
    toy.params = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1000,), x.dtype), toy.params)
    return toy


@pytest.fixture
def folder(tmp_path, monkeypatch):
    entry = Entry(load=load, classes=("Toy",), marker="toy.json", options=Options, abstract=abstract)
    monkeypatch.setitem(SCORERS, "brightness", entry)
    assert table.SCORERS is SCORERS
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps({"architectures": ["Toy"]}))
    return tmp_path / "mine"


def settings(path, **values):
    return {"timeout": 0.0, "brightness": {"path": str(path), "scale": 2.0, "notes": ""} | values}


def test_a_new_scorer_is_loaded_by_its_name_with_the_options_of_the_config(folder):
    reward = load_reward("brightness", settings(folder))
    assert isinstance(reward, Reward) and reward.name == "brightness" and reward.params["scale"] == 2.0
    with pytest.raises(UserError, match=r"^reward\.brightness\.path: is empty, but reward\.scorers names brightness"):
        load_reward("brightness", settings(""))
    with pytest.raises(UserError, match=r"^reward\.brightness\.notes: there is no file none\.txt"):
        load_reward("brightness", settings(folder, notes="none.txt"))


def test_a_new_scorer_is_recognised_by_the_class_or_the_marker_of_its_folder(folder):
    assert class_of(folder) == "Toy" and load_reward(str(folder)).params["scale"] == 1.0
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        class_of(folder)
    (folder / "toy.json").write_text("{}")
    assert class_of(folder) == "Toy"


def test_a_new_scorer_is_named_among_the_known_ones(folder):
    with pytest.raises(UserError, match="known names are brightness, classical, judge"):
        load_reward("nobody")
    with pytest.raises(UserError, match=r"reward\.videoscore\.path: .* holds 'Toy' and no Idefics2"):
        load_reward("videoscore", {"videoscore": {"path": str(folder), "query_prompt": ""}})


def test_a_new_scorers_options_are_checked_in_a_config(folder):
    found = fields._fields_of_scorers()
    own = {key: field for key, field in found.items() if ".brightness." in key}
    assert set(own) == {f"reward.brightness.{key}" for key in ("path", "scale", "notes")}
    assert own["reward.brightness.scale"].words == "a number above 0"


def test_a_new_scorer_is_planned_without_its_weights(folder):
    (reward, other) = abstract_rewards("brightness, shapes", settings(""))
    assert isinstance(reward.params["scale"], jax.ShapeDtypeStruct) and other.name == "shapes"
