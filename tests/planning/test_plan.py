"""The command plan, on the tests' tiny model, and its parts on numbers made by hand."""

import importlib.metadata
import importlib.util
import io
import json

import pytest
from rich.console import Console

from vpo_jax import plan
from vpo_jax.planning.chips import CHIPS, parse_topology
from vpo_jax.planning.compiled import collectives_of, mismatch, missing
from vpo_jax.planning.cost import Cost
from vpo_jax.planning.fit import Linear, abstract_meshes, make_plan, measure_programs
from vpo_jax.planning.job import make_job
from vpo_jax.planning.propose import propose
from vpo_jax.runtime import cli
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import Meshes, abstract_mesh
from vpo_jax.runtime.trees import bytes_of


def run(*flags):
    shown = io.StringIO()
    plan.main(flags, Console(file=shown, width=200))
    return shown.getvalue()


def config_of(job, *more):
    words, overrides = cli.split_overrides([*job, *more])
    config = cli.load_config(words[0].removeprefix("--config="))
    cli.override(config, overrides)
    return config


@pytest.fixture(scope="module")
def planned(job):
    tiny = make_job(config_of(job))
    return tiny, measure_programs(tiny)


@pytest.mark.slow
def test_a_plan_needs_no_weights_and_says_what_sets_the_floor(job, model_folder, tmp_path):
    folder = tmp_path / "configs only"
    for file in model_folder.rglob("*.json"):
        if "safetensors" not in file.name and file.parent.name != "tokenizer":
            (folder / file.relative_to(model_folder).parent).mkdir(parents=True, exist_ok=True)
            (folder / file.relative_to(model_folder)).write_bytes(file.read_bytes())
    output = tmp_path / "plan.json"
    said = run(*job, f"--config.model.path={folder}", "--topology=gpu:2xh100", "--price=2", f"--output={output}")
    assert "fits" in said and "a thousand pairs" in said and "not compiled: there is no compiler for GPUs" in said
    written = json.loads(output.read_text())
    assert written["plan"]["mesh"] == {"data": 2, "fsdp": 1, "context": 1, "tensor": 1} and written["plan"]["fits"]
    assert written["plan"]["stages"]["rollout"]["flops"] > 0 and written["smallest"]["devices"] == 1


@pytest.mark.slow
def test_without_a_topology_every_kind_of_chip_gets_its_smallest_mesh(job):
    said = run(*job)
    assert all(f"1 x {name}, data=1 " in said for name in CHIPS)


@pytest.mark.slow
def test_a_batch_that_the_topology_does_not_divide_is_refused(job):
    with pytest.raises(UserError, match=r"train\.prompts_per_step: 2 is not a multiple of 16"):
        run(*job, "--topology=v5e:4x4")


@pytest.mark.slow
def test_the_flags_that_a_refusal_prints_are_accepted_and_fit(job):
    asked = *job, "--topology=gpu:4xh100", "--config.rollout.microbatch=2"
    shown = io.StringIO()
    with pytest.raises(UserError, match="is not a multiple of 4"):
        plan.main(asked, Console(file=shown, width=200))
    flags = [word for word in shown.getvalue().split() if word.startswith("--config.")]
    assert any(flag.startswith(("--config.mesh.context", "--config.mesh.tensor")) for flag in flags)
    assert "\nfits\n" in run(*asked, *flags)


@pytest.mark.parametrize("text", ["v5e", "v5e:0x4", "gpu:8xv5e", "gpu:h100", "v9:4x4", "gpu:0xh100", "v5e:4x4x4x4"])
def test_an_unknown_topology_is_named_with_those_there_are(text):
    with pytest.raises(UserError, match=r"--topology: .*v5e:4x4.*gpu:8xh100"):
        parse_topology(text)


@pytest.mark.parametrize(
    ("text", "count"), [("v5p:4x4x4", 64), ("v6e:8x8", 64), ("gpu:16xh200", 16), ("tpu7x:2x2x1", 8)]
)
def test_a_topology_says_how_many_devices_it_has(text, count):
    assert parse_topology(text).count == count


def test_the_flags_are_checked(job):
    for flag in ("--utilisation=0", "--price=-1", "--price=nan"):
        with pytest.raises(UserError, match=flag.partition("=")[0]):
            run(*job, flag)


APART = "--config.reward.devices=2", "--config.preference.max_pair_age=1"


@pytest.mark.slow
def test_scorers_on_devices_of_their_own_leave_the_others_without_them(job, tmp_path):
    output = tmp_path / "plan.json"
    said = run(*job, *APART, "--topology=gpu:4xh100", f"--output={output}")
    assert "2 that train" in said and "2 that score" in said
    written = json.loads(output.read_text())
    train, score = written["plan"], written["scoring"]
    assert "scorers" not in train["resident_bytes"] and set(score["resident_bytes"]) == {"autoencoder", "scorers"}
    assert {"rollout", "update"} < set(train["stages"]) and "decode" in score["stages"]
    assert not set(train["stages"]) & set(score["stages"])
    assert written["seconds"] == max(train["seconds"], score["seconds"])


def test_scorers_apart_need_a_topology_that_leaves_devices_to_train_on(job):
    with pytest.raises(UserError, match=r"--topology: name one, of which reward\.devices=2 score"):
        run(*job, *APART)
    with pytest.raises(UserError, match=r"reward\.devices: 2 of 2 devices leave none to train on"):
        run(*job, *APART, "--topology=gpu:2xh100")


@pytest.mark.slow
def test_no_prompts_are_needed(job):
    assert "smallest mesh" in run(*job, "--config.data.prompts=")


@pytest.mark.slow
def test_fsdp_shards_weights_and_gathers_them_in_every_forward(planned):
    job, lines = planned
    topology = parse_topology("v5e:1x2")
    whole = make_plan(job, lines, topology, Meshes.of(abstract_mesh(2)))
    sharded = make_plan(job, lines, topology, Meshes.of(abstract_mesh(1, 2)))
    assert whole.resident["frozen backbone"] == bytes_of(job.policy.frozen)
    assert sharded.resident["frozen backbone"] < 0.75 * whole.resident["frozen backbone"]
    gathered = {stage.name: stage.collectives.get("all-gather", 0) for stage in sharded.stages}
    scorer = next(name for name in gathered if name.startswith("score "))
    assert all(gathered[name] > 0 for name in ("encode", "rollout", "decode", scorer, "errors", "update"))
    assert not any("all-gather" in stage.collectives for stage in whole.stages)
    assert "all-reduce" in {kind for stage in whole.stages for kind in stage.collectives}


def test_twice_the_chips_halve_the_compute_of_a_chip_and_leave_the_work(planned):
    job, lines = planned
    one, two = (make_plan(job, lines, parse_topology(f"gpu:{n}xh100"), Meshes.of(abstract_mesh(n))) for n in (1, 2))
    rollouts = [next(stage for stage in p.stages if stage.name == "rollout") for p in (one, two)]
    assert rollouts[0].flops == pytest.approx(rollouts[1].flops)
    assert rollouts[0].seconds["compute"] == pytest.approx(2 * rollouts[1].seconds["compute"])


@pytest.mark.slow
def test_what_does_not_fit_is_cut_into_microbatches_and_then_over_more_chips(planned):
    import dataclasses

    job, lines = planned
    plain = make_plan(job, lines, parse_topology("v5e:1x1"), Meshes.of(abstract_mesh()))
    room = dataclasses.replace(CHIPS["v5e"], memory=0.9 * plain.peak)
    smaller = propose(job, lines, room)
    assert smaller is not None and smaller.fits and (smaller.changes or smaller.topology.count > 1)
    none = propose(job, lines, dataclasses.replace(room, memory=10.0))
    assert none is not None and not none.fits


def test_an_abstract_mesh_has_no_devices_and_the_sizes():
    axes = {"data": -1, "fsdp": 3, "context": 1, "tensor": 1, "rollout": "context=2", "score": ""}
    meshes = abstract_meshes(axes, 6)
    assert [tuple(mesh.shape.values()) for mesh in meshes] == [(2, 3, 1, 1), (3, 1, 2, 1), (2, 3, 1, 1)]


def test_weights_that_sampling_wants_whole_are_gathered_once_a_step(planned):
    job, lines = planned
    topology = parse_topology("v5e:1x2")
    sharded = make_plan(job, lines, topology, Meshes.of(abstract_mesh(1, 2)))
    mixed = make_plan(job, lines, topology, Meshes.of(abstract_mesh(1, 2))._replace(rollout=abstract_mesh(2)))
    before, after = (next(stage for stage in p.stages if stage.name == "rollout") for p in (sharded, mixed))
    whole = bytes_of((job.policy.frozen, job.policy.initial))
    held = sharded.resident["frozen backbone"] + sharded.resident["initial policy"]
    assert after.collectives["all-gather"] == whole - held < before.collectives["all-gather"]
    alone = make_plan(job, lines, topology, Meshes.of(abstract_mesh(2)))
    rollout = next(stage for stage in alone.stages if stage.name == "rollout")
    assert after.temporaries == pytest.approx(rollout.temporaries + whole)
    assert mixed.resident == sharded.resident and after.seconds["interconnect"] < before.seconds["interconnect"]
    scores = make_plan(job, lines, topology, Meshes.of(abstract_mesh(2))._replace(score=abstract_mesh(1, 2)))
    assert scores.resident["scorers"] == sharded.resident["scorers"] < bytes_of([r.params for r in job.rewards])
    assert scores.resident["frozen backbone"] == bytes_of(job.policy.frozen)


def test_collectives_are_counted_by_kind_in_a_programs_text():
    text = """
      %a = bf16[8,128]{1,0} all-gather(%x), dimensions={0}
      %b = (f32[16]{0}, f32[32]{0}) all-reduce-start(%y, %z), to_apply=%add
      %c = f32[4,4]{1,0} all-gather(%z)
      %d = f32[4] add(%a, %c)
      %e = ((f32[4]{0}, f32[2]{0}), (f32[16]{0}, f32[8]{0})) all-gather-start(%y, %z)
      %f = (f32[16]{0}, f32[16]{0}, u32[], u32[]) collective-permute-start(%y)
    """
    gathered = 8 * 128 * 2 + 64 + (16 + 8) * 4
    assert collectives_of(text) == {"all-gather": gathered, "all-reduce": 48 * 4, "collective-permute": 64}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_libtpu_compiles_every_stage_for_a_slice_that_is_not_here(job, tmp_path):
    output = tmp_path / "plan.json"
    flags = "--config.train.prompts_per_step=4", "--topology=v5e:2x2", f"--output={output}"
    run(*job, *flags, "--stages=encode, errors")
    assert set(json.loads(output.read_text())["compiled"]) == {"encode", "errors"}
    said = run(*job, *flags)
    assert "compiled stage" in said
    compiled = json.loads(output.read_text())["compiled"]
    # So small a model computes in the chip's scratch memory: the compiler needs no temporaries.
    assert compiled["update"]["arguments"] > 0 and compiled["update"]["flops"] > 0
    assert compiled["update"]["collectives"]["all-reduce"] > 0, compiled["update"]


def test_an_unknown_stage_is_refused_before_anything_is_compiled(job):
    with pytest.raises(UserError, match="--stages: updat: no such stage; the job has encode, rollout, decode, score"):
        run(*job, "--topology=v5e:1x2", "--stages=updat")


@pytest.mark.parametrize(("version", "said"), [("0.0.42.1", ""), ("0.0.52", "libtpu 0.0.52 is not the one")])
def test_another_libtpu_than_jax_asks_for_is_said(monkeypatch, version, said):
    asked = ["numpy>=2.0", "libtpu==0.0.42.*; extra == 'tpu'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: asked)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    assert mismatch().startswith(said) and bool(mismatch()) == bool(said)


def test_a_missing_compiler_is_said_with_the_way_to_it():
    assert "GPUs" in missing(parse_topology("gpu:8xh100"))


def test_rows_that_share_work_are_paid_for_one_by_one_where_a_device_does_not_hold_them_all():
    line = Linear(Cost(10.0, 0.0, 0.0), Cost(1.0, 0.0, 0.0), shared=4, alone=Cost(9.0, 0.0, 0.0))
    assert [line.at(rows).flops for rows in (1, 2, 4, 8)] == [9.0, 18.0, 14.0, 18.0]


def test_a_step_calls_each_program_as_often_as_training_does(planned):
    job, _ = planned
    found = {program.name: (program.calls, program.unit, program.shared) for program in job.programs}
    updates, candidates = job.config.train.updates_per_step, job.config.rollout.candidates
    assert found["errors"] == (2 * updates, 2, 1) and found["update"] == (updates, 2, 1)
    assert found["rollout"] == found["decode"] == found["encode"] == (1, 1, 1)
    assert all(found[name] == (1, 1, candidates) for name in found if name.startswith("score "))
