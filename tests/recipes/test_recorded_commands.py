"""The commands that are recorded beside the shipped files can be typed again."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "vpo_jax"
RECIPES = sorted(PACKAGE.rglob("assets/**/recipe.json"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_every_recorded_command_names_a_recipe_that_is_still_here(path):
    commands = json.loads(path.read_text())["commands"]
    assert commands
    for command in commands:
        name = re.fullmatch(r"python -m vpo_jax\.(?:shapes|recipes)\.(\w+) .*", command)[1]
        assert importlib.util.find_spec(f"vpo_jax.recipes.{name}") is not None, command


def test_all_shipped_models_have_a_recipe():
    assert {path.parent.name for path in RECIPES} >= {"base", "scorer", "videoscore"}
