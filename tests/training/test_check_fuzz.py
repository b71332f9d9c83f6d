"""Configs that no person meant: `check` answers each with a UserError of one line, or lets it pass; nothing else."""

import copy
import math
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from vpo_jax.runtime import cli
from vpo_jax.runtime.cli import flatten_config, load_config
from vpo_jax.runtime.errors import UserError
from vpo_jax.training.check import FIELDS, check

SHIPPED = load_config("configs/vpo.py").to_dict()
KEYS = sorted(FIELDS)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 40),
    st.floats(),
    st.text(max_size=30),
    st.sampled_from([math.nan, math.inf, -0.0, 2**63, -(2**63), 1e-320, 10**400, "", "\0", "../..", "a,b", "shapes"]),
)
NAMES = st.text(max_size=5).filter(lambda name: "." not in name)  # ConfigDict itself refuses a dot
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3), st.dictionaries(NAMES, SCALARS, max_size=2))
WORDS = st.one_of(
    st.text(max_size=20), st.sampled_from(KEYS), st.sampled_from(["a", "train", "train.", ".seed", "seed.x"])
)


def changed(changes, removed=(), added=None):
    config: Any = copy.deepcopy(SHIPPED)
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    for key in removed:
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        del node[last]
    for key, value in (added or {}).items():
        config[key] = value
    # As a config file may make it: setting a field of a ConfigDict would cast.
    return ConfigDict(config)


def refused(config):
    """Whether check refuses the config, in one sentence that names a field; anything else it raises is a bug."""
    try:
        check(config)
    except UserError as error:
        said = " ".join(str(error).split())
        assert ": " in said and len(said) < 5000
        return True
    return False


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=4))
def test_any_values_in_any_fields_pass_or_are_refused_by_name(changes):
    config = changed(changes)
    if not refused(config):
        for key, value in flatten_config(config):
            field = FIELDS[key]
            assert isinstance(value, field.kind) or (field.kind is float and isinstance(value, int)), key


@settings(max_examples=100, deadline=None)
@given(
    st.sets(st.sampled_from(KEYS), max_size=3),
    st.dictionaries(
        st.text("abcdefgh_-.é ", min_size=1, max_size=8).filter(lambda k: k not in SHIPPED), VALUES, max_size=2
    ),
)
def test_missing_and_added_fields_are_refused(removed, added):
    added = {key: value for key, value in added.items() if "." not in key and value != {}}
    assert refused(changed({}, removed, added)) == bool(removed or added)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(WORDS, st.one_of(st.text(max_size=20), st.integers().map(str), st.floats().map(str))), max_size=4
    )
)
def test_any_flags_are_read_or_refused(overrides):
    config = load_config("configs/vpo.py")
    try:
        words, pairs = cli.split_overrides([f"--config.{key}={text}" for key, text in overrides])
        assert words == []
        cli.override(config, pairs)
    except UserError:
        return
    refused(config)
