"""When the reference moves, and where to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vpo_jax.algorithms.state import TrainState, init_curriculum
from vpo_jax.runtime.errors import UserError
from vpo_jax.training import reference
from vpo_jax.training.evaluator import Evaluator
from vpo_jax.training.reference import make_reference
from vpo_jax.training.run import Run

POLICY, REFERENCE = {"a": jnp.full(3, 2.0)}, {"a": jnp.zeros(3)}


def state_of(curriculum=None):
    empty = dict.fromkeys(TrainState._fields)
    given = {"policy": POLICY, "reference": REFERENCE, "curriculum": curriculum or init_curriculum()}
    return TrainState(**(empty | given))


def follow(schedule, step, gain=None, every=4, decay=0.9, curriculum=None):
    state = make_reference(schedule, every, decay)(state_of(curriculum), step, gain)
    return float(state.reference["a"][0]), state.curriculum


def seen(correct, pairs=10.0, held_out=-np.inf, refreshed_at=0):
    return init_curriculum()._replace(
        correct=jnp.float32(correct),
        pairs=jnp.float32(pairs),
        held_out=jnp.float32(held_out),
        refreshed_at=jnp.int32(refreshed_at),
    )


def test_a_frozen_reference_never_moves():
    assert all(follow("frozen", step, gain=1.0)[0] == 0.0 for step in range(9))


def test_the_curriculum_copies_the_policy_every_k_steps():
    moved = [step for step in range(1, 13) if follow("refresh", step)[0] == 2.0]
    assert moved == [4, 8, 12]
    assert int(follow("refresh", 8)[1].refreshed_at) == 8


def test_a_refreshed_reference_lies_in_buffers_of_its_own():
    state = make_reference("refresh", 1, 0.0)(state_of(), 1, None)
    assert state.reference["a"].unsafe_buffer_pointer() != POLICY["a"].unsafe_buffer_pointer()


def test_an_averaged_reference_follows_the_policy():
    assert follow("ema", 1)[0] == pytest.approx(0.2)


def test_an_adaptive_reference_moves_when_accuracy_is_high_and_the_held_out_gain_has_not_fallen():
    assert follow("adaptive", 8, 0.5, curriculum=seen(9.0))[0] == 2.0
    assert follow("adaptive", 8, None, curriculum=seen(9.0))[0] == 0.0  # no evaluation, no decision
    assert follow("adaptive", 8, 0.5, curriculum=seen(6.0))[0] == 0.0
    assert follow("adaptive", 8, 0.5, curriculum=seen(9.0, held_out=0.6))[0] == 0.0
    assert follow("adaptive", 8, 0.5, curriculum=seen(9.0, refreshed_at=5))[0] == 0.0
    assert follow("adaptive", 8, 0.5, curriculum=seen(0.0, pairs=0.0))[0] == 0.0
    _, after = follow("adaptive", 8, 0.5, curriculum=seen(9.0))
    assert (float(after.held_out), int(after.refreshes), float(after.pairs)) == (0.5, 1, 0.0)


@pytest.mark.parametrize(
    ("schedule", "every", "decay", "says"),
    [
        ("sometimes", 1, 0.9, "choose one of frozen, refresh, ema, adaptive"),
        ("refresh", 0, 0.9, "reference.every"),
        ("ema", 1, 1.5, "reference.decay"),
    ],
)
def test_a_wrong_schedule_is_named_with_the_fix(schedule, every, decay, says):
    with pytest.raises(UserError, match=says):
        make_reference(schedule, every, decay)


@pytest.mark.slow
def test_an_adaptive_reference_copies_the_policy_that_was_evaluated(configure, run, toy_reward, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "HIGH_ACCURACY", 0.0)
    evaluated, finished = {}, {}
    evaluate, finish = Evaluator.evaluate, Run.finish

    def watch_evaluate(self, state, record):
        evaluated[int(state.step)] = jax.device_get((state.policy, state.reference))
        return evaluate(self, state, record)

    def watch_finish(self, state, *rest):
        finished[int(state.step)] = jax.device_get((state.policy, state.reference))
        return finish(self, state, *rest)

    monkeypatch.setattr(Evaluator, "evaluate", watch_evaluate)
    monkeypatch.setattr(Run, "finish", watch_finish)
    config = configure(train__steps=4, reference__schedule="adaptive", reference__every=1, eval__every=2)
    result = run(config, tmp_path, tuning_prompts=["t1", "t2"], held_out=[toy_reward(name="judge")])
    assert sorted(evaluated) == [2, 4] and sorted(finished) == [1, 2, 3, 4]
    assert int(result.state.curriculum.refreshes) >= 1

    def is_same(a, b):
        return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

    # The first evaluation has nothing to fall below: it approves.
    assert is_same(finished[2][1], evaluated[2][0]) and not is_same(evaluated[2][1], evaluated[2][0])
    assert is_same(finished[1][1], evaluated[2][1]) and is_same(finished[3][1], finished[2][1])
    assert not is_same(finished[3][0], finished[2][0])
