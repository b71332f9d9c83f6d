"""A person's own reward: a function or an object in a module, and what becomes of its mistakes."""

import importlib
import re
import sys
import threading

import jax
import numpy as np
import pytest

from vpo_jax.rewards.combine import motion_columns, parse_weights
from vpo_jax.rewards.loading import load_reward, load_rewards, load_scorer
from vpo_jax.rewards.protocol import Reward
from vpo_jax.runtime.errors import UserError

MODULE = """
import dataclasses, sys
import numpy as np

def bright(videos, prompts):
    assert videos.dtype == np.uint8 and videos.flags.writeable and all(type(p) is str for p in prompts)
    return {"bright": videos.mean((1, 2, 3, 4)), "words": [float(len(p.split())) for p in prompts]}

def declared(videos, prompts):
    assert len(videos) != 6 or videos.shape[1] != 8, "it is not asked where everything is declared"
    return {"dynamic_degree": np.arange(len(videos)) * np.nan, "bright": videos.mean((1, 2, 3, 4))}

declared.dimensions, declared.ranges, declared.trains = ("bright", "dynamic_degree"), ((0, 255), (0, 1)), False

def constant(videos, prompts): return {"constant": np.full(len(videos), 7.0)}
def nothing(videos, prompts): return None
def one_number(videos, prompts): return {"bright": 3.0}
def text(videos, prompts): return {"bright": ["good"] * len(videos)}
def other(videos, prompts): return {"shine": np.zeros(len(videos))}
other.dimensions, other.ranges = ("bright",), ((0.0, 1.0),)
def unranged(videos, prompts): return {"bright": np.zeros(len(videos))}
unranged.dimensions, unranged.ranges = ("bright",), ((1.0, 1.0),)
def unnamed(videos, prompts): return {"a/b": np.zeros(len(videos))}
def undimensioned(videos, prompts): return {"bright": np.zeros(len(videos))}
undimensioned.ranges = ((0.0, 1.0),)
def leaves(videos, prompts): sys.exit(3)

def broken(videos, prompts):
    return {"x": videos.mean(1)[1000]}

number = 3

@dataclasses.dataclass
class Bright:
    name: str = "compiled"
    dimensions: tuple = ("bright",)
    ranges: tuple = ((0.0, 255.0),)
    trains: bool = True
    jittable: bool = True
    params: float = 2.0
    frames: tuple = (0,)
    wrong: bool = False

    def frame_indices(self, num_frames): return self.frames
    def prepare(self, prompts): return np.zeros((len(prompts), 1), np.float32)
    def score(self, params, videos, prepared):
        if self.wrong:
            if videos.mean() > 3: return 0
        return params * videos.astype("float32").mean((1, 2, 3, 4))[:, None]

compiled, misled, traced = Bright(), Bright(frames=(0, 0)), Bright(wrong=True)
flat = Bright(ranges=((0.0, 1.0),) * 2, dimensions=("a", "b"))

class Half:
    name = "half"
    def score(self, params, videos, prepared): return 0

half = Half()
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "mine_for_tests.py").write_text(MODULE)
    (folder / "broken_for_tests.py").write_text("def f(:\n")
    (folder / "failing_for_tests.py").write_text("import json\njson.loads('{')\n")
    sys.path.insert(0, str(folder))
    yield importlib.import_module("mine_for_tests")
    sys.path.remove(str(folder))
    sys.modules.pop("mine_for_tests", None)


def videos(count=3, frames=5):
    return np.random.default_rng(0).integers(0, 256, (count, frames, 10, 12, 3), np.uint8)


def test_a_plain_function_scores_videos_and_prompts():
    scores = load_scorer("mine_for_tests:bright")(videos(), ["one", "", "three more words"])
    np.testing.assert_allclose(scores["bright"], videos().mean((1, 2, 3, 4)), rtol=1e-6)
    assert scores["words"].tolist() == [1, 0, 3] and scores["words"].dtype == np.float32


def test_what_a_function_does_not_declare_is_what_it_gives_on_the_probe_clips():
    reward = load_reward("mine_for_tests:bright")
    assert isinstance(reward, Reward)
    assert (reward.name, reward.dimensions) == ("bright", ("bright", "words"))
    assert reward.ranges == ((0.0, 255.0), (5.0, 10.0))
    assert reward.trains and not reward.jittable
    # One value for every clip gives a range as wide as the value is large.
    assert load_reward("mine_for_tests:constant").ranges == ((7.0, 14.0),)


def test_what_a_function_declares_is_taken_and_scores_that_are_not_finite_go_through():
    reward = load_reward("mine_for_tests:declared")
    assert reward.dimensions == ("bright", "dynamic_degree") and reward.ranges == ((0.0, 255.0), (0.0, 1.0))
    assert motion_columns([reward]) == (1,)
    assert parse_weights("declared/bright=3", [reward]).tolist() == [0.75, 0.25]
    scores = reward.score({}, videos(2), reward.prepare(["a", "b"]))
    assert np.isfinite(scores[:, 0]).all() and np.isnan(scores[:, 1]).all()
    with pytest.raises(UserError, match=r"reward\.scorers: declared is for evaluation only"):
        load_rewards("mine_for_tests:declared", training=True)


def test_an_object_that_follows_the_protocol_is_compiled():
    scorer = load_scorer("mine_for_tests:compiled")
    assert scorer.reward.jittable and scorer.reward.name == "compiled"
    scores = scorer(videos(), ["", "", ""])
    np.testing.assert_allclose(scores["bright"], 2 * videos()[:, 0].mean((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module:f", "needs a module 'no_such_module', and there is none; start the command where"),
        ("not/a/module:f", "is no MODULE:ATTRIBUTE"),
        ("mine_for_tests:", "is no MODULE:ATTRIBUTE"),
        ("mine_for_tests:brigth", "is missing: mine_for_tests has bright, declared, constant"),
        ("broken_for_tests:f", "cannot be imported: SyntaxError"),
        ("failing_for_tests:f", "cannot be imported: JSONDecodeError in failing_for_tests.py, line 2"),
        ("mine_for_tests:number", "is of type int; give a function"),
        ("mine_for_tests:Bright", "is a class; give an object of it, as bright = Bright()"),
        ("mine_for_tests:half", "has no dimensions, ranges, trains, jittable, params, frame_indices, prepare; give"),
        ("mine_for_tests:nothing", "gives NoneType; give {dimension: [one number a video]}, here 6 each"),
        ("mine_for_tests:one_number", "gives shape [] for 'bright'"),
        ("mine_for_tests:text", "gives no numbers for 'bright'"),
        ("mine_for_tests:unranged", "has the ranges ((1.0, 1.0),); give (lowest, highest) for each of bright"),
        ("mine_for_tests:undimensioned", "has ranges and no dimensions"),
        ("mine_for_tests:unnamed", "has the dimensions ('a/b',); give a tuple of different words"),
        ("mine_for_tests:broken", "raised IndexError in mine_for_tests.py, line 29"),
        ("mine_for_tests:leaves", "called sys.exit"),
    ],
)
def test_a_mistake_is_told_with_the_field_the_function_and_the_fix(source, message):
    with pytest.raises(UserError, match=re.escape(f"reward.scorers: {source} {message}")):
        load_rewards(source, training=True)


def test_a_mistake_in_mid_run_is_told_too():
    with pytest.raises(UserError, match="mine_for_tests:other gives the dimensions shine, declared are bright"):
        load_scorer("mine_for_tests:other")(videos(), ["a"] * 3)
    with pytest.raises(UserError, match=r"misled gives \[0, 0\] as frame_indices\(5\)"):
        load_scorer("mine_for_tests:misled")(videos(), ["a"] * 3)
    with pytest.raises(UserError, match=r"flat gives scores of shape \[3, 1\] for 3 videos and 2 dimensions"):
        load_scorer("mine_for_tests:flat")(videos(), ["a"] * 3)
    with pytest.raises(UserError, match=r"traced raised TracerBoolConversionError in mine_for_tests\.py"):
        load_scorer("mine_for_tests:traced")(videos(), ["a"] * 3)


def test_a_function_that_hangs_is_named_and_waited_for_no_longer_than_the_limit(module):
    release = threading.Event()

    def hangs(clips, prompts):
        release.wait(60)
        return {"a": np.zeros(len(clips))}

    module.hangs = hangs
    with pytest.raises(
        UserError, match=r"reward\.timeout: mine_for_tests:hangs has not answered for 6 videos in 0\.05 s"
    ):
        load_reward("mine_for_tests:hangs", {"timeout": 0.05})
    hangs.dimensions, hangs.ranges = ("a",), ((0.0, 1.0),)
    reward = load_reward("mine_for_tests:hangs", {"timeout": 0.05})
    with pytest.raises(
        UserError, match=r"for 3 videos in 0\.05 s; correct it, or give it more time with --config\.reward"
    ):
        reward.score({}, videos(), reward.prepare(["a"] * 3))
    release.set()
    assert reward.score({}, videos(), reward.prepare(["a"] * 3)).tolist() == [[0.0]] * 3


def test_without_a_limit_a_function_runs_in_the_thread_that_asks(module):
    seen = []
    module.watched = lambda clips, prompts: seen.append(threading.current_thread()) or {"a": np.zeros(len(clips))}
    load_reward("mine_for_tests:watched", {"timeout": 0.0})
    load_reward("mine_for_tests:watched", {"timeout": 60.0})
    assert seen[0] is threading.current_thread() and seen[1] is not seen[0] and seen[1].daemon


def test_no_videos_are_no_scores():
    reward = load_reward("mine_for_tests:bright")
    assert np.asarray(reward.score({}, videos(0), reward.prepare([]))).shape == (0, 2)
    assert jax.tree.leaves(reward.params) == []
