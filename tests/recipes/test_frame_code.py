"""A fresh UNet with a frame code tells frames apart; one without does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.models.unet3d_config import UNet3DConfig
from vpo_jax.models.unet3d_layers import Compute, TemporalConvLayer
from vpo_jax.recipes.frame_code import init_frame_code
from vpo_jax.runtime.trees import flatten

FRAMES, CHANNELS, GROUPS = 8, 32, 8


def _noise(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, (4, FRAMES, 8, 8, CHANNELS))


@pytest.mark.slow
def test_the_code_names_every_frame() -> None:
    layer = TemporalConvLayer(UNet3DConfig.from_dict({"norm_num_groups": GROUPS}), Compute())
    x = _noise(jax.random.key(0))
    fresh = layer.init(jax.random.key(1), x)["params"]
    coded = init_frame_code(fresh, jax.random.key(2), GROUPS, FRAMES, amplitude=0.5)
    assert jax.tree.map(jnp.shape, flatten(coded)) == jax.tree.map(jnp.shape, flatten(fresh))

    np.testing.assert_array_equal(layer.apply({"params": fresh}, x), x)  # the last layer starts at zero
    code = np.asarray(layer.apply({"params": coded}, x)) - np.asarray(x)
    # The same for every video and place, whatever the noise: the code depends on the padding alone.
    per_frame = code.mean((0, 2, 3))  # [F, C]
    np.testing.assert_allclose(code, np.broadcast_to(per_frame[None, :, None, None], code.shape), atol=1e-4)
    assert abs((per_frame - per_frame.mean(0)).std() - 0.5) < 1e-3
    apart = np.linalg.norm(per_frame[:, None] - per_frame[None], axis=-1) + 100 * np.eye(FRAMES)
    assert apart.min() > 0.05 * np.sqrt(CHANNELS)


def test_an_order_can_be_read_from_it() -> None:
    """Reversed in time, what a layer adds is reversed only where the layer is blind to order."""
    layer = TemporalConvLayer(UNet3DConfig.from_dict({"norm_num_groups": GROUPS}), Compute())
    x = _noise(jax.random.key(3))
    coded = init_frame_code(layer.init(jax.random.key(1), x)["params"], jax.random.key(2), GROUPS, FRAMES)
    added = layer.apply({"params": coded}, x) - x
    backwards = layer.apply({"params": coded}, x[:, ::-1]) - x[:, ::-1]
    assert float(jnp.abs(added - backwards[:, ::-1]).max()) > 0.1
