"""What an evaluation says of the first step's winners."""

import jax
import pytest

from vpo_jax.runtime.mesh import Meshes, make_mesh
from vpo_jax.training.setup import make_setup


@pytest.mark.parametrize("pairs", ["best_worst", "group"])
def test_winners_are_watched_under_the_weights_that_the_run_would_return(configure, pipeline, toy_reward, pairs):
    config = configure(preference__pairs=pairs)
    with jax.set_mesh(mesh := make_mesh(1, devices=jax.devices()[:1])):
        setup = make_setup(config, pipeline, [toy_reward()], Meshes.of(mesh), [f"{i} balls" for i in range(8)])
        dpo, frozen, state = setup.algorithm, setup.frozen, setup.fresh_state()
        candidates = setup.rollouts.next(state, 0)
        state, _ = dpo.select(state, candidates.rollout, setup.score(candidates))
        far = jax.tree.map(lambda x: x + 0.3, state.policy)
        kept = dpo.evaluate(state._replace(policy=far), frozen, frozen.initial)
        moved = dpo.evaluate(state, frozen, far)
    change, error = "policy/winner_error_change", "standard_error/policy/winner_error_change"
    assert kept[change] == 0.0 == kept[error] and kept["policy/winner_error_rises"] == 0.5
    assert moved[change] > 0.0 and moved[error] > 0.0 and moved["policy/winner_error_rises"] > 0.5
    assert kept["policy/watched"] == moved["policy/watched"] > 1
