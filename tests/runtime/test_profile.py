"""Which steps are traced, and that a trace always ends."""

import jax
import pytest

from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.profile import Profiler, parse_steps


@pytest.fixture
def calls(monkeypatch):
    found = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: found.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: found.append("stop"))
    return found


def walk(profiler, steps, calls):
    for number in steps:
        with profiler.step(number):
            calls.append(number)


@pytest.mark.parametrize(("text", "steps"), [("", []), ("3", [3]), ("3:5", [3, 4]), ("1:2", [1])])
def test_the_last_step_is_not_traced_and_a_number_alone_is_one_step(text, steps):
    assert list(parse_steps(text)) == steps


@pytest.mark.parametrize("text", ["0", "0:2", "5:3", "3:3", "-1:2", "3:", ":3", "3:5:7", "a", "3.0", " 3", "1" * 10])
def test_what_is_no_range_of_steps_is_refused_by_name(text):
    with pytest.raises(UserError, match=r"^profile\.steps: .*write 3:5 for steps 3 and 4"):
        parse_steps(text)


def test_a_trace_starts_before_its_first_step_and_ends_after_its_last(calls, tmp_path):
    walk(Profiler(tmp_path, "3:5"), range(1, 7), calls)
    assert calls == [1, 2, ("start", str(tmp_path)), 3, 4, "stop", 5, 6]


def test_a_run_that_goes_on_within_the_range_traces_what_is_left_of_it(calls, tmp_path):
    walk(Profiler(tmp_path, "3:5"), range(4, 7), calls)
    assert calls == [("start", str(tmp_path)), 4, "stop", 5, 6]


def test_a_trace_that_is_cut_short_is_written_once(calls, tmp_path):
    profiler = Profiler(tmp_path, "1:9")
    walk(profiler, range(1, 3), calls)
    profiler.stop()
    profiler.stop()
    assert calls == [("start", str(tmp_path)), 1, 2, "stop"]


def test_without_steps_nothing_is_traced(calls, tmp_path):
    walk(Profiler(tmp_path, ""), range(1, 4), calls)
    assert calls == [1, 2, 3]
