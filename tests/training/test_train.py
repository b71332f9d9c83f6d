"""The loop: what it writes, how it goes on after a stop, and what stops it."""

import dataclasses
import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.conftest import PROMPTS
from vpo_jax.algorithms.dpo.algorithm import DPO
from vpo_jax.checkpoints.peft import write_adapter
from vpo_jax.models.lora import init_lora
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import Meshes, make_mesh
from vpo_jax.runtime.metrics import read_metrics
from vpo_jax.runtime.signals import Interrupted, Stop
from vpo_jax.runtime.trees import flatten
from vpo_jax.training.evaluator import due
from vpo_jax.training.policy import lora_config, read_initial
from vpo_jax.training.progress import Progress
from vpo_jax.training.record import RunRecord
from vpo_jax.training.run import NonFinite, mean_of
from vpo_jax.training.setup import make_setup


def stopping_reward(toy_reward, stop, at_call):
    """A toy scorer on the host that raises the stop flag at its n-th call, in the middle of a step."""
    calls = []

    class Stopping(toy_reward):
        def score(self, params, videos, prepared):
            calls.append(1)
            if len(calls) == at_call:
                stop.signum = 15
            return np.asarray(super().score(params, videos, prepared))

    return Stopping(jittable=False)


def assert_same_state(a, b):
    first, second = flatten(a), flatten(b)
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path], err_msg=path)


def lines(folder):
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in read_metrics(folder)]


EVERYTHING = {
    "train__steps": 4,
    "ema__decay": 0.9,
    "preference__max_pair_age": 1,
    "preference__caption_dropout": 0.2,
    "reference__every": 3,
    "checkpoint__every": 2,
    "rollout__eta": 0.5,
}


TRUNK = {"rollout__trunk_level": 0.5, "rollout__num_inference_steps": 4}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(options, marks=pytest.mark.slow) for options in ({"preference__pairs": "group"}, TRUNK))],
    ids=["plain", "group", "trunk"],
)
def test_a_stopped_run_goes_on_to_the_same_bits(configure, run, toy_reward, tmp_path, options):
    config = configure(**EVERYTHING, **options)
    # On the host in every run: a scorer compiled otherwise rounds otherwise.
    never = stopping_reward(toy_reward, Stop(), 0)
    whole = run(config, tmp_path / "whole", rewards=(never,))
    for name, at_call in (("early", 1), ("late", 4)):
        stop = Stop()
        with pytest.raises(Interrupted) as stopped:
            run(config, tmp_path / name, stop=stop, rewards=(stopping_reward(toy_reward, stop, at_call),))
        assert stopped.value.exit_code == 143
        resumed = run(config, tmp_path / name, rewards=(never,))
        assert_same_state(resumed.state, whole.state)
        assert lines(tmp_path / name) == lines(tmp_path / "whole")
    # The reference was refreshed at step 3 only, so it is neither the policy nor the initial one.
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(whole.state.reference), jax.tree.leaves(whole.state.policy), strict=True)
    )
    assert int(whole.state.curriculum.refreshed_at) == 3
    assert int(whole.state.optimizer[-1][0].count) == 8
    assert set(np.asarray(whole.state.algorithm.buffer.step).tolist()) == {2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("pairs", ["top_k", "all", "group", "listwise"])
def test_every_form_of_groups_trains_to_its_end(configure, run, tmp_path, pairs):
    overrides = {"preference__label_temperature": 0.5 if pairs == "listwise" else 0.0, "preference__anchor": 0.5}
    overrides |= {"preference__winner_safeguard": True, "train__microbatch": 2, "ema__decay": 0.5}
    config = configure(preference__pairs=pairs, **overrides)
    result = run(config, tmp_path)
    written = lines(tmp_path)
    assert [line["step"] for line in written] == [1, 2, 3] and bool(result.state.finite)
    considered = {"top_k": 4, "all": 6}.get(pairs, 1) * 8
    for line in written:
        assert line["pair/kept"] + sum(v for k, v in line.items() if k.startswith("pair/dropped_")) == considered
        assert line["loss/applied"] == 1.0 and np.isfinite(line["loss/preference"]) and line["loss/anchor"] >= 0.0
        assert 0.0 <= line["loss/loser_share"] <= 1.0 and 0.0 <= line["loss/implicit_accuracy"] <= 1.0
    base, tuned = flatten(run.pipeline().trainable), flatten(result.pipeline.trainable)
    assert any(not np.array_equal(base[k], tuned[k]) for k in base)


@pytest.mark.slow
def test_raising_the_number_of_steps_continues_the_same_run(configure, run, tmp_path):
    whole = run(configure(train__steps=3), tmp_path / "whole")
    run(configure(train__steps=2), tmp_path / "raised")
    raised = run(configure(train__steps=3), tmp_path / "raised")
    assert_same_state(raised.state, whole.state)
    assert [line["step"] for line in lines(tmp_path / "raised")] == [1, 2, 3]
    assert run(configure(train__steps=3), tmp_path / "raised").state.step == 3


def test_a_run_writes_what_there_is_to_watch(configure, run, toy_reward, tmp_path):
    config = configure(eval__every=2, eval__prompts=5, log__samples=2, reference__schedule="adaptive")
    judge = toy_reward(name="judge")
    result = run(config, tmp_path, tuning_prompts=["t1", "t2", "t3", "t4", "t5"], held_out=[judge])
    written = lines(tmp_path)
    assert [line["step"] for line in written] == [1, 2, 3]
    for line in written:
        assert line["pair/kept"] + sum(v for k, v in line.items() if k.startswith("pair/dropped_")) == 8
        assert line["loss/applied"] == 1.0 and line["reward/non_finite"] == 0.0
        assert {"reward/toy/visual_quality", "pair/margin", "pair/motion", "loss/gradient_norm"} <= line.keys()
    assert written[0]["loss/u_noise"] == 0.0
    assert "held_out/judge/visual_quality" in written[1] and "held_out/judge/visual_quality" in written[2]
    assert 0.0 <= written[1]["held_out/win_rate/judge/visual_quality"] <= 1.0
    assert {"eval/toy/dynamic_degree", "policy/winner_error_rises", "policy/distance_to_initial"} <= written[1].keys()
    samples = sorted(path.parent.name for path in (tmp_path / "samples").rglob("*.webp"))
    assert samples == ["step_000000"] * 2 + ["step_000002"] * 2 + ["step_000003"] * 2
    assert result.pipeline.decoder_params is not None
    base, tuned = flatten(run.pipeline().trainable), flatten(result.pipeline.trainable)
    assert [k for k in base if not np.array_equal(base[k], tuned[k])] == ["attn.to_q/kernel", "attn.to_v/kernel"]


def test_the_first_update_of_a_run_starts_at_ln_2(configure, run, tmp_path):
    run(configure(train__steps=1, train__updates_per_step=1), tmp_path)
    (line,) = lines(tmp_path)
    assert line["loss/preference"] == pytest.approx(np.log(2.0), rel=1e-7)
    assert line["loss/implicit_accuracy"] == 0.5


def test_full_fine_tuning_trains_every_layer(configure, run, tmp_path):
    result = run(configure(lora__rank=0, train__steps=1), tmp_path)
    base, tuned = flatten(run.pipeline().trainable), flatten(result.pipeline.trainable)
    assert all(not np.array_equal(base[k], tuned[k]) for k in base)


def test_the_result_goes_on_from_the_average_in_its_direction(configure, run, tmp_path):
    config = configure(train__steps=2, ema__decay=0.5, ema__extrapolation=2.0)
    result = run(config, tmp_path)
    base = run.pipeline().trainable
    average = flatten(result.policy.merged(base, result.state.ema))
    base, tuned = flatten(base), flatten(result.pipeline.trainable)
    changed = [name for name in base if not np.array_equal(base[name], tuned[name])]
    assert changed == ["attn.to_q/kernel", "attn.to_v/kernel"]
    for name in changed:
        np.testing.assert_allclose(tuned[name] - base[name], 2.0 * (average[name] - base[name]), atol=1e-7)
        assert np.abs(average[name] - base[name]).max() > 1e-5


def test_one_prompt_with_scores_that_are_not_finite_is_dropped_and_counted(configure, run, toy_reward, tmp_path):
    run(configure(train__steps=1), tmp_path, rewards=(toy_reward(poison="red"),))
    (line,) = lines(tmp_path)
    assert line["reward/non_finite"] > 0 and line["pair/dropped_non_finite"] == line["reward/non_finite"] / 4
    assert line["loss/applied"] == 1.0


def test_a_step_whose_scores_are_all_not_finite_stops_the_run_with_what_made_it(configure, run, toy_reward, tmp_path):
    with pytest.raises(NonFinite, match="step 1: every score"):
        run(configure(), tmp_path, rewards=(toy_reward(poison="clip"),))
    left = json.loads((tmp_path / "failure" / "step_1" / "step.json").read_text())
    assert len(left["prompts"]) == 8 and left["scores"][0] == ["nan", "nan"]
    assert (tmp_path / "failure" / "step_1" / "checkpoints").is_dir()


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_finite_state(configure, run, tmp_path):
    from vpo_jax.checkpoints.orbax_store import CheckpointStore

    with pytest.raises(NonFinite, match="loss or its gradient"):
        run(configure(preference__beta=1e38, checkpoint__every=0), tmp_path)
    store = CheckpointStore(tmp_path / "failure" / "step_1" / "checkpoints", read_only=True)
    _, state, _ = store.read(parts=("policy", "finite"))
    assert not bool(state["finite"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["policy"]))
    assert not (tmp_path / "checkpoints" / "1").exists()


def test_metrics_are_written_one_step_late_but_never_after_their_checkpoint(configure, run, tmp_path, monkeypatch):
    from vpo_jax.checkpoints import orbax_store
    from vpo_jax.runtime import metrics

    events = []
    write, save = metrics.MetricsWriter.write, orbax_store.CheckpointStore.save
    monkeypatch.setattr(
        metrics.MetricsWriter, "write", lambda self, step, m: (events.append(("line", step)), write(self, step, m))
    )
    monkeypatch.setattr(
        orbax_store.CheckpointStore,
        "save",
        lambda self, step, *rest: (events.append(("save", step)), save(self, step, *rest)),
    )
    run(configure(train__steps=4, checkpoint__every=3), tmp_path)
    assert events == [("line", 1), ("line", 2), ("line", 3), ("save", 3), ("line", 4), ("save", 4)]


def test_a_record_survives_json():
    record = RunRecord("abc", {"rollout": 1.5}, {"toy/visual_quality": [0.25, 1.0]}, ({"eval/gain": 0.0},))
    record = record.with_evaluation({"eval/gain": 0.5, "held_out/judge/overall": 1e-7})
    assert RunRecord.from_json(json.loads(json.dumps(record.as_json()))) == record
    assert len(record.evaluations) == 2
    fresh = RunRecord("abc")
    assert RunRecord.from_json(json.loads(json.dumps(fresh.as_json()))) == fresh


@pytest.mark.slow
def test_the_steps_of_profile_steps_are_traced_for_tensorboard(configure, run, tmp_path):
    run(configure(train__steps=3, profile__steps="2:3"), tmp_path)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    content = trace.read_bytes()
    for phase in (b"train", b"rollout", b"score", b"update"):
        assert phase in content, phase
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_nothing_is_copied_to_the_devices_inside_the_loop_but_explicitly(configure, run, tmp_path, monkeypatch):
    update = DPO.update

    def careless(self, state, frozen, index):
        assert jnp.size(jnp.add(state.step, state.step)) == 1  # what is there already may be computed with
        backbone = jax.tree.map(np.asarray, frozen.backbone)
        return update(self, state, frozen._replace(backbone=backbone), index)

    monkeypatch.setattr(DPO, "update", careless)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run(configure(), tmp_path)
    assert float(jnp.asarray(np.ones(()))) == 1.0  # and outside it everything is


def test_a_judge_is_refused_as_a_training_scorer(configure, run, toy_reward, tmp_path):
    with pytest.raises(UserError, match=r"reward.scorers: 'judge' is for evaluation only"):
        run(configure(), tmp_path, rewards=(toy_reward(name="judge", trains=False),))


def test_other_prompts_on_resume_are_refused(configure, run, tmp_path):
    run(configure(train__steps=1), tmp_path)
    with pytest.raises(UserError, match="not the prompts that this run began with"):
        run(configure(train__steps=2), tmp_path, prompts=["something else"])


def test_without_dynamic_degree_the_log_says_that_the_motion_gate_is_off(configure, run, toy_reward, tmp_path, capsys):
    still = toy_reward(dimensions=("visual_quality",), ranges=((0.0, 1.0),))
    run(configure(train__steps=1), tmp_path, rewards=(still,))
    said = capsys.readouterr().err
    assert "the motion gate is off" in said
    assert "step 1/1  reward 0." in said and "win accuracy" in said and "videos/s" in said and "left" in said


def test_steps_without_a_pair_say_what_dropped_them(capsys):
    progress = Progress(total=20)
    nothing = {"reward/total": 0.5, "pair/margin": float("nan"), "pair/kept": 0.0}
    nothing |= {"pair/dropped_margin": 3.0, "pair/dropped_motion": 1.0, "pair/dropped_tie": 0.0}
    progress.update(1, nothing | {"pair/kept": 2.0})
    for step in range(2, 20):
        progress.update(step, nothing)
    shown = capsys.readouterr().err
    said = [line for line in shown.splitlines() if "no pair was kept" in line]
    assert [line.split(":")[0] for line in said] == ["step 2", "step 11"]
    assert "(3 by margin, 1 by motion)" in said[0] and "preference.margin" in said[0]
    assert "nan" not in shown and "reward 0.500" in shown


def test_what_is_due_every_so_many_steps_is_also_due_at_the_end():
    assert [step for step in range(1, 8) if due(step, 3, 7)] == [3, 6, 7]
    assert [step for step in range(1, 8) if due(step, 0, 7)] == [7]


def test_metrics_are_means_over_updates_weighted_by_their_counts():
    found = mean_of([{"a": (np.float32(3), np.float32(1)), "b": (0.0, 0.0)}, {"a": (np.float32(1), np.float32(3))}])
    assert found["a"] == 1.0 and np.isnan(found["b"])


@pytest.mark.slow
def test_cached_encodings_train_to_the_same_bits(configure, run, tmp_path):
    config = configure(train__steps=2, preference__caption_dropout=0.2)
    plain = run(config, tmp_path / "plain", tuning_prompts=["clip of a ball"])
    config.data.text_cache = str(tmp_path / "text")
    cached = run(config, tmp_path / "cached", tuning_prompts=["clip of a ball"])
    assert_same_state(plain.state.policy, cached.state.policy)
    assert lines(tmp_path / "plain") == lines(tmp_path / "cached")
    assert len(list((tmp_path / "text").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("cached", "on_devices"), [(True, False), (True, True), (False, False)])
def test_the_text_encoder_leaves_the_devices_once_its_encodings_are_cached(
    configure, pipeline, toy_reward, tmp_path, cached, on_devices
):
    config = configure(data__text_cache=str(tmp_path / "text") if cached else "")
    if on_devices:
        pipeline = dataclasses.replace(pipeline, params=jax.device_put(pipeline.params))
    own = pipeline.text_params["embedding"]
    meshes = Meshes.of(make_mesh(1, devices=jax.devices()[:1]))

    def alive():
        gc.collect()
        return sum(x.shape == own.shape and x is not own for x in jax.live_arrays())

    before = alive()
    with jax.set_mesh(meshes.update):
        setup = make_setup(config, pipeline, (toy_reward(),), meshes, PROMPTS)
        assert setup.encode(PROMPTS[:2]).hidden.shape == (2, 6, 8)
    # What a person has put on the devices stays there, and a run takes no second copy of it.
    assert alive() == before + (not cached)
    assert np.isfinite(np.asarray(own)).all()


def test_a_run_starts_from_an_adapter_with_the_reference_there_too(configure, run, pipeline_of, tmp_path):
    config = configure(train__steps=1)
    family, params = pipeline_of().family, pipeline_of().trainable
    lora = lora_config(config, family)
    adapters = jax.tree.map(lambda x: x + np.float32(0.05), init_lora(jax.random.key(3), params, lora))
    write_adapter(tmp_path / "adapter", adapters, lora, "base")
    config.lora.path = str(tmp_path / "adapter")
    start = read_initial(config, family, params)
    jax.tree.map(np.testing.assert_array_equal, start, jax.device_get(adapters))
    # An update that moves nothing leaves what a run begins with.
    config.optimizer.learning_rate = 1e-30
    result = run(config, tmp_path / "run", initial=start)
    assert_same_state(result.state.reference, start)
    assert_same_state(result.policy.initial, start)
