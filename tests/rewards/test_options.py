"""Scorers' options: what they may hold, and the fields of a config that follow from them."""

import dataclasses

import pytest

from vpo_jax.rewards.options import check_options, config_limits, limits_of, option
from vpo_jax.rewards.table import SCORERS
from vpo_jax.runtime import cli
from vpo_jax.runtime.errors import UserError
from vpo_jax.training.check import FIELDS

WITH_OPTIONS = {name: entry.options for name, entry in SCORERS.items() if entry.options is not None}


@dataclasses.dataclass(frozen=True)
class Toy:
    kind: str = option("plain", choices=("plain", "fancy"), in_config=True)
    count: int = option(2, low=1, in_config=True)
    rate: float = option(1.0, above=0.5)
    file: str = option("", is_file=True)


@pytest.mark.parametrize("name", sorted(WITH_OPTIONS))
def test_configs_have_a_scorers_options_and_their_defaults(name):
    config = cli.load_config("configs/vpo.py").reward[name].to_dict()
    defaults = {field.name: field.default for field in dataclasses.fields(WITH_OPTIONS[name])}
    assert config == {"path": ""} | {key: defaults[key] for key in config_limits(WITH_OPTIONS[name])}


@pytest.mark.parametrize("name", sorted(WITH_OPTIONS))
def test_the_check_of_a_config_follows_from_the_options(name):
    checked = {key for key in FIELDS if key.startswith(f"reward.{name}.")}
    assert checked == {f"reward.{name}.{key}" for key in ("path", *config_limits(WITH_OPTIONS[name]))}
    for key, (kind, limits) in config_limits(WITH_OPTIONS[name]).items():
        field = FIELDS[f"reward.{name}.{key}"]
        assert field.kind is kind
        if limits.choices:
            assert all(field.holds(choice) for choice in limits.choices) and not field.holds("another")
        if limits.low is not None:
            assert field.holds(limits.low) and not field.holds(limits.low - 1)
        if limits.above is not None:
            assert field.holds(limits.above + 1) and not field.holds(limits.above)


def test_no_other_scorer_has_a_section_in_the_config():
    reward = cli.load_config("configs/vpo.py").reward.to_dict()
    assert {key for key, value in reward.items() if isinstance(value, dict)} == set(WITH_OPTIONS)


def test_only_some_options_are_keys_of_the_config():
    assert set(config_limits(Toy)) == {"kind", "count"} and set(limits_of(Toy)) == {"kind", "count", "rate", "file"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "odd"}, r"^toy\.kind: 'odd' is not one of plain, fancy"),
        ({"count": 0}, r"^toy\.count: must be an integer of at least 1, found 0"),
        ({"count": 1.5}, r"^toy\.count: must be an integer"),
        ({"rate": 0.5}, r"^toy\.rate: must be above 0\.5, found 0\.5"),
        ({"rate": "fast"}, r"^toy\.rate: must be above 0\.5, found 'fast'"),
    ],
)
def test_an_option_that_cannot_be_is_named(values, message):
    with pytest.raises(UserError, match=message):
        check_options("toy", Toy(**values))
    check_options("toy", Toy())
