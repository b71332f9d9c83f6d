import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from tests.running import run_program
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import batch_sharding, constrain, infer_shardings, make_mesh, replicated


def test_one_device_makes_a_mesh_of_four_auto_axes():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 64}, r"mesh\.data: .* needs 64 devices and there are 1"),
        ({"tensor": 64}, r"mesh\.data: .* needs 64 devices and there are 1"),
        ({"data": 0}, r"mesh\.data: 0 is not a size"),
        ({"fsdp": -1}, r"mesh\.fsdp: only one axis may be -1"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(UserError, match=message):
        make_mesh(**sizes)


def test_constrain_is_nothing_outside_a_mesh():
    x = jnp.ones(3)
    assert constrain(x, P("data")) is x


def test_eight_devices_are_cut_by_rules():
    done = run_program("eight_devices.py", devices=8)
    assert done.returncode == 0, done.stderr


def test_rules_accept_arrays_too():
    mesh = make_mesh()
    assert infer_shardings({"a": jnp.ones((2, 2))}, mesh, [("a", P("data"))])["a"].spec == P("data")
    assert replicated(mesh).is_fully_replicated and batch_sharding(mesh).spec == P(("data", "fsdp"))
