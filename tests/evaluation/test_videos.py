import numpy as np

from vpo_jax.evaluation.videos import side_by_side


def test_base_stands_above_tuned_with_white_between_them():
    base = np.zeros((3, 2, 4, 5, 3), np.uint8)
    tuned = np.full_like(base, 9)
    tuned[1] = 50
    both = side_by_side(base, tuned)
    assert both.shape == (2, 4 + 4 + 4, 3 * 5 + 2 * 4, 3)
    assert (both[:, :4, :5] == 0).all() and (both[:, 8:, 9:14] == 50).all()
    assert (both[:, 4:8] == 255).all() and (both[:, :, 5:9] == 255).all()
