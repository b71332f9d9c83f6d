"""What a guard refuses, and what it lets through."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.runtime.transfers import allowed, guarded, put


def test_a_guard_refuses_what_is_copied_by_the_way_and_lets_through_what_is_meant():
    double = jax.jit(lambda x: x + x)
    there = jnp.ones(3)
    with guarded():
        np.testing.assert_array_equal(double(there), 2.0)
        np.testing.assert_array_equal(double(put(np.ones(3))), 2.0)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            double(np.ones(3))
        with allowed():
            np.testing.assert_array_equal(double(np.ones(3)), 2.0)
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            double(np.ones(3))
    np.testing.assert_array_equal(double(np.ones(3)), 2.0)


def test_several_processes_are_not_guarded_and_put_leaves_numpy_arrays_to_jit(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    one = np.int32(3)
    assert put(one) is one
    with guarded():
        assert int(jax.jit(lambda x: x + x)(one)) == 6
