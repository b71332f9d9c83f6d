"""What context, tensor, fsdp and a fused kernel change of a program's cost, on Wan's published sizes."""

import dataclasses
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from rich.console import Console

from tests.running import on_devices
from vpo_jax import plan
from vpo_jax.models.attention import attention
from vpo_jax.models.fused_attention import BACKWARD, FORWARD, as_shapes
from vpo_jax.planning.chips import CHIPS, Topology
from vpo_jax.planning.cost import measure
from vpo_jax.planning.fit import make_plan, measure_programs
from vpo_jax.planning.job import make_job
from vpo_jax.planning.propose import propose
from vpo_jax.runtime.cli import load_config
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.mesh import Meshes, abstract_mesh

ROOT = Path(__file__).resolve().parents[2]
LENGTH, WIDTH, HEADS, LAYERS = 3510, 1536, 12, 30  # Wan 2.1 1.3B at 33 frames of 240x416: tokens, channels, ...
TWO = Topology("h100", CHIPS["h100"], 2)
JOB = ("--config=configs/vpo.py:wan", "--config.model.path=wan2.1-1.3b", "--config.reward.scorers=shapes")


def lines_of(backend, rank=64):
    config = load_config("configs/vpo.py:wan")
    config.model.path, config.data.prompts, config.reward.scorers = "wan2.1-1.3b", "shapes:train", "shapes"
    config.model.attention, config.lora.rank = backend, rank
    job = make_job(config)
    job = dataclasses.replace(job, programs=tuple(p for p in job.programs if p.name in ("errors", "update")))
    return job, measure_programs(job)


@pytest.fixture(scope="module")
def xla():
    return lines_of("xla")


@pytest.fixture(scope="module")
def fused():
    return lines_of("cudnn")


def shapes(*lengths):
    return [jax.ShapeDtypeStruct((2, length, 4, 16), jnp.bfloat16) for length in lengths]


def by_cudnn(query, key, value):
    return attention(query, key, value, backend="cudnn")


def test_fused_attention_costs_its_two_products_and_five_backward_and_stores_no_scores():
    query, key, value = shapes(64, 48, 48)
    product = 2 * (2 * 64 * 48 * 4 * 16)
    forward = measure(by_cudnn, query, key, value)
    assert forward.flops == 2 * product == measure(attention, query, key, value).flops
    assert forward.temporaries == 2 * 64 * 4 * 16 * 2
    loss = jax.grad(lambda *inputs: jnp.sum(by_cudnn(*inputs)), (0, 1, 2))
    assert measure(loss, query, key, value).flops == (2 + 5) * product


def test_stand_ins_have_the_names_and_shapes_of_jaxs_own_primitives(monkeypatch):
    def outputs(function):
        jaxpr = jax.make_jaxpr(jax.grad(lambda *inputs: jnp.sum(function(*inputs)), (0, 1, 2)))(*shapes(64, 48, 48))
        found = {}
        for eqn in jaxpr.jaxpr.eqns:
            if eqn.primitive.name in (FORWARD, BACKWARD):
                found[eqn.primitive.name] = [(var.aval.shape, var.aval.dtype) for var in eqn.outvars][:3]
        return found

    with as_shapes():
        described = outputs(by_cudnn)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_is_flash_attention", lambda *_, **__: None)
    assert outputs(by_cudnn) == described and len(described) == 2


@pytest.mark.slow
def test_cudnn_saves_the_bytes_of_the_scores(xla, fused):
    ours, theirs = (lines.on("errors", {}).at(1) for _, lines in (xla, fused))
    scores = HEADS * LENGTH**2 * (4 + 2)  # float32, and the weights in bfloat16
    assert ours.flops == pytest.approx(theirs.flops)
    saved = ours.temporaries - theirs.temporaries
    assert 0.75 * scores < saved < scores  # another moment sets the peak without them


def test_context_divides_activations_and_leaves_keys_values_and_text_whole(fused):
    _, lines = fused
    one, two = (lines.on("errors", {"context": n}).each for n in (1, 2))
    assert two.flops == pytest.approx(one.flops / 2, rel=0.02)  # the text's keys are computed everywhere
    row = LENGTH * WIDTH * 2
    text = 2 * LAYERS * WIDTH * 2 * 512
    assert one.temporaries / 2 < two.temporaries < one.temporaries
    assert two.temporaries - one.temporaries / 2 < 2 * row + text + 0.1 * one.temporaries
    # Of the values' gradient each device needs its own tokens alone, though all are there.
    whole, tenth = (lines.on("update", {"context": n}).at(2).flops for n in (1, 10))
    assert tenth == pytest.approx(whole / 10, rel=0.06)
    gathered = LAYERS * 2 * row / 2  # a device lacks half of each block's keys and values
    assert two.sent == pytest.approx(gathered, rel=0.02)


def test_context_halves_the_scores_of_xlas_attention(xla):
    _, lines = xla
    one, two = (lines.on("errors", {"context": n}).at(1).temporaries for n in (1, 2))
    assert one - two > 0.5 * HEADS * LENGTH**2 * (4 + 2)


def test_an_axis_that_divides_neither_heads_nor_tokens_saves_nothing_there(fused):
    _, lines = fused
    tensor = {n: lines.on("errors", {"tensor": n}).at(1) for n in (1, 4, 8)}
    assert tensor[4].flops == pytest.approx(tensor[1].flops / 4, rel=0.1)
    attention_flops = LAYERS * 4 * LENGTH**2 * WIDTH  # 8 does not divide 12 heads
    assert tensor[8].flops > attention_flops


def test_gradients_of_all_weights_are_sharded_over_fsdp_as_the_weights_are():
    job, lines = lines_of("cudnn", rank=0)
    one, eight = (lines.on("update", {"fsdp": n}).once.temporaries for n in (1, 8))
    gradient = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(job.policy.initial))
    assert one > 0.9 * gradient and one - eight > 0.7 * gradient


def test_a_mesh_over_context_is_found_where_data_and_fsdp_find_none(xla):
    job, lines = xla
    job = dataclasses.replace(job, config=job.config.copy_and_resolve_references())
    job.config.train.prompts_per_step = job.config.train.microbatch = 1
    job = dataclasses.replace(job, programs=tuple(dataclasses.replace(p, batch=4, microbatch=4) for p in job.programs))
    chip = CHIPS["h100"]
    whole, parted = (
        make_plan(job, lines, dataclasses.replace(TWO, count=n), Meshes.of(abstract_mesh(context=n))) for n in (1, 2)
    )
    room = dataclasses.replace(chip, memory=(whole.peak + parted.peak) / 2 / 0.92)
    found = propose(job, lines, room, [1, 2])
    assert found is not None and found.fits and found.topology.count == 2
    assert found.meshes.update.shape["context"] * found.meshes.update.shape["tensor"] == 2
    assert not propose(job, lines, room, [1]).fits


def said_of(*flags):
    shown = io.StringIO()
    plan.main([*JOB, *flags, "--analytic"], Console(file=shown, width=200))
    return shown.getvalue()


def test_cudnn_is_refused_for_tpus():
    with pytest.raises(UserError, match=r"model\.attention: cudnn .* v5e:4x4 .*=xla"):
        said_of("--topology=v5e:4x4", "--config.model.attention=cudnn")


@pytest.mark.slow
def test_a_gradients_cost_on_a_mesh_is_what_xla_compiles():
    meshes = [{}, {"context": 2}, {"tensor": 4}, {"context": 2, "tensor": 2}]
    command = [sys.executable, str(Path(__file__).with_name("on_four_devices.py")), json.dumps(meshes)]
    env = on_devices(4) | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for sizes, found in zip(meshes, json.loads(done.stdout), strict=True):
        estimated = found["estimated"]
        # XLA counts the operations that are computed element by element too.
        assert estimated["flops"] == pytest.approx(found["flops"], rel=0.06), sizes
        # The CPU's compiler fuses less and keeps more: the gaps are those of one device.
        assert 0.6 < estimated["temporaries"] / found["bytes"] < 1.15, sizes
        # An all-reduce's result travels 2 (n - 1) / n times, a gathered one (n - 1) / n.
        parts = math.prod(sizes.values())
        often = {"all-reduce": 2, "all-gather": 1}
        sent = sum(often.get(kind, 1) * size for kind, size in found["collectives"].items())
        share = {1: 0, 2: 1 / 2, 4: 3 / 4}[parts] if len(sizes) < 2 else 1 / 2  # each over an axis of 2
        assert estimated["sent"] == pytest.approx(sent * share, rel=0.08), sizes
