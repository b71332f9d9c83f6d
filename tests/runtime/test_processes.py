"""Joining a run of several processes, and what one process alone makes of the calls between them."""

import jax
import numpy as np
import pytest

from vpo_jax.runtime import processes
from vpo_jax.runtime.errors import UserError

WHOLE = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}


@pytest.fixture(autouse=True)
def dispatch_as_before():
    before = jax.config.read("jax_cpu_enable_async_dispatch")
    yield
    jax.config.update("jax_cpu_enable_async_dispatch", before)


@pytest.mark.parametrize("absent", list(WHOLE))
def test_two_of_the_three_variables_name_the_third(absent):
    with pytest.raises(UserError, match=f"^{absent}: not set"):
        processes.join_processes({name: value for name, value in WHOLE.items() if name != absent})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: 'two' is not a whole number"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID: 2 is not below JAX_NUM_PROCESSES=2"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID: '-1' is not a whole number"),
    ],
)
def test_a_number_that_cannot_be_is_named(change, message):
    with pytest.raises(UserError, match=message):
        processes.join_processes(WHOLE | change)


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_several_tasks_of_a_scheduler_join_and_one_task_does_not(variable, monkeypatch):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: joined.append(given))
    processes.join_processes({variable: "1"})
    processes.join_processes({})
    assert joined == [] and jax.config.read("jax_cpu_enable_async_dispatch")
    processes.join_processes({variable: "4"})
    assert joined == [()] and not jax.config.read("jax_cpu_enable_async_dispatch"), "programs on CPUs keep their order"
    processes.join_processes(WHOLE)
    assert joined[1:] == [("127.0.0.1:1", 2, 0)]


def test_others_that_cannot_be_reached_are_an_error_with_a_question(monkeypatch):
    def refuse(*given):
        raise RuntimeError("DEADLINE_EXCEEDED: no answer\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1: .*DEADLINE_EXCEEDED: no answer\); are all of them started"):
        processes.join_processes(WHOLE)


def test_a_tpu_host_by_itself_goes_on_alone(monkeypatch, capsys):
    def alone():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(processes, "has_tpu", lambda: True)
    monkeypatch.setattr(jax.distributed, "initialize", alone)
    processes.join_processes({})
    assert "one process only" in capsys.readouterr().err


@pytest.mark.parametrize("number", [2, 3, 5, 8])
def test_the_shares_of_all_processes_are_the_whole_in_its_order(number, monkeypatch):
    values = np.arange(number * 3).reshape(number, 3) + 1
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    shares = []
    for this in range(3):
        monkeypatch.setattr(jax, "process_index", lambda this=this: this)
        shares.append(processes.share(values))

    def gathered(mine):
        others = [np.concatenate([s, np.zeros((len(mine) - len(s), 3), s.dtype)]) for s in shares]
        return np.stack(others)

    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gathered)
    np.testing.assert_array_equal(processes.unshare(shares[2], number), values)


def test_a_failure_of_the_main_process_stops_it_with_its_own_words():
    def fail():
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        processes.main_first(fail)
    assert processes.agree(3) == 3 and processes.is_main()
