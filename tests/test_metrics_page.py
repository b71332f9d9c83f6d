"""docs/metrics.md explains every name that metrics.jsonl can hold, and no other."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

from tests.running import lines

ROOT = Path(__file__).resolve().parents[1]
PLACES = "reward|pair|loss|policy|time|eval|held_out|alarm|standard_error"
WANTED = re.compile(rf'f?"((?:{PLACES})/[^"\s]+)"')


def documented() -> list[str]:
    """The names in the page's tables, with * for what stands for many."""
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = re.findall(rf"^\| `((?:{PLACES})/[\w/]+)` \|", page, re.MULTILINE)
    return [re.sub(r"\b[A-Z]+\b", "*", name) for name in names]


def in_code() -> set[str]:
    """Names and patterns of names that stand in the code; * where a value is filled in."""
    found = set()
    for path in (ROOT / "vpo_jax").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        found |= {re.sub(r"\{[^}]*\}", "*", name) for name in WANTED.findall(text)}
        found |= {f"time/{name}" for name in re.findall(r'\.phase\("(\w+)"\)', text)}
        found |= {f"alarm/{name}" for name in re.findall(r'\bAlarm\("(\w+)"', text)}
    return {name for name in found if name == name.lower()}  # time/NAME is a docstring's


def same(one: str, other: str) -> bool:
    return fnmatchcase(one, other) or fnmatchcase(other, one)


def test_every_name_that_the_code_can_write_is_explained():
    names = documented()
    for found in sorted(in_code()):
        # Progress and report also choose by the beginning of a name: "pair/dropped".
        assert any(same(found, name) or name.startswith(found) for name in names), f"docs/metrics.md lacks {found}"


def test_every_name_that_is_explained_is_one_that_the_code_can_write():
    found = in_code()
    for name in documented():
        assert any(same(name, other) for other in found), f"docs/metrics.md explains {name}, which nothing writes"


def test_no_name_is_explained_twice():
    names = documented()
    assert len(names) == len(set(names)) > 30


def test_every_name_that_a_run_writes_is_explained(finished):
    workdir, _ = finished
    names = documented()
    for line in lines(workdir):
        for written in line.keys() - {"step"}:
            assert any(fnmatchcase(written, name) for name in names), f"docs/metrics.md lacks {written}"
