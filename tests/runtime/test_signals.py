import os
import signal

import pytest

from tests.running import run_program
from vpo_jax.runtime.signals import Interrupted, catch_signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_a_flag_until_it_is_checked(signum, code):
    with catch_signals() as stop:
        stop.check()
        os.kill(os.getpid(), signum)
        assert stop.asked()
        with pytest.raises(Interrupted) as error:
            stop.check()
    assert error.value.exit_code == code


def test_the_handlers_from_before_are_back_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with catch_signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_ends_the_process_at_once():
    done = run_program("second_signal.py")
    assert done.returncode == -signal.SIGTERM and done.stdout == ""
