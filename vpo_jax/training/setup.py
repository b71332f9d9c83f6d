"""What a training run is made of, from its config: parameters on their devices, programs, state."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from vpo_jax.algorithms.protocol import Algorithm, Frozen
from vpo_jax.algorithms.state import TrainState, infer_state_shardings, init_state
from vpo_jax.diffusion.trajectory import Trajectory
from vpo_jax.pipeline import Pipeline
from vpo_jax.rewards.combine import dimension_names
from vpo_jax.rewards.scoring import Scores, Weights, bring
from vpo_jax.runtime.mesh import Meshes, infer_shardings, replicated
from vpo_jax.runtime.processes import free, place
from vpo_jax.runtime.transfers import allowed
from vpo_jax.training.check import check_context, check_meshes
from vpo_jax.training.evaluator import Evaluator
from vpo_jax.training.optimizer import make_optimizer
from vpo_jax.training.policy import Policy, make_policy, text_params
from vpo_jax.training.programs import Programs, decode_program, make_programs
from vpo_jax.training.rollouts import Candidates, Rollouts
from vpo_jax.training.text import TextEncoding

Tree = Any


class Setup(NamedTuple):
    """A run, ready to begin; `jax.set_mesh(meshes.update)` is the caller's.

    Attributes:
      policy: its frozen and initial parameters lie on the devices.
      frozen: see `algorithms.protocol.Frozen`.
      programs: see `training.programs`.
      algorithm: that of the programs.
      encode: prompts -> encodings.
      rollouts: samples candidates.
      score: candidates -> float32 [P * N, D], computed when it returns.
      evaluator: of the tuning prompts.
      result: state -> the trainable parameters that the run would return if it ended now.
      fresh_state: makes the state before the first step.
      abstract_state: the state's shapes, dtypes and shardings: what a checkpoint is restored into.
    """

    policy: Policy
    frozen: Frozen
    programs: Programs
    algorithm: Algorithm
    encode: TextEncoding
    rollouts: Rollouts
    score: Callable[[Candidates], jax.Array]
    evaluator: Evaluator
    result: Callable[[TrainState], Tree]
    fresh_state: Callable[[], TrainState]
    abstract_state: TrainState


def make_setup(
    config: Any,
    pipeline: Pipeline,
    rewards: Sequence[Any],
    meshes: Meshes,
    prompts: Sequence[str],
    tuning_prompts: Sequence[str] = (),
    held_out: Sequence[Any] = (),
    initial: Tree | None = None,
) -> Setup:
    """Places parameters and builds every program; the arguments are those of `training.train.train`.

    Raises:
      UserError: sizes that do not fit each other or the mesh, a scorer that is for evaluation only.
    """
    check_meshes(config, meshes)
    size = pipeline.video_size(*(config.rollout[k] for k in ("num_frames", "height", "width")))
    check_context(meshes, pipeline.family.context_length(*size))
    rules = pipeline.family.sharding_rules
    policy = make_policy(config, pipeline.family, pipeline.trainable, initial)
    programs = make_programs(config, pipeline, policy, rewards, meshes.update)

    def placed(tree: Tree, mesh: Any) -> Tree:
        return place(tree, infer_shardings(tree, mesh, rules))

    # Before the backbone: a large text encoder whose encodings are cached is gone when that comes.
    encoder = placed(text_params(config, pipeline.family, pipeline.text_params), meshes.update)
    encode = TextEncoding(programs.encode.function, encoder, pipeline.tokenize, config.train.prompts_per_step)
    # As many prompts as a step has, at least two: no further program is compiled.
    plain = [config.rollout.negative_prompt, ""] * config.train.prompts_per_step
    encodings = encode(plain[: max(2, config.train.prompts_per_step)])
    negative, empty = (
        jax.tree.map(lambda x, i=i: jax.device_put(x, replicated(meshes.update))[i], encodings) for i in (0, 1)
    )
    if config.data.text_cache:
        encode.cache(config.data.text_cache, [*prompts, *tuning_prompts])
        free(encoder, pipeline.text_params)
    # Policy, reference and initial policy share one frozen backbone. The copies on the host are not needed any more.
    backbone, theta0 = placed(policy.frozen, meshes.update), placed(policy.initial, meshes.update)
    policy = dataclasses.replace(policy, frozen=backbone, initial=theta0)
    frozen = Frozen(backbone, theta0, empty)

    algorithm, rollout = programs.algorithm, programs.rollout.function
    branches = programs.branch.function if programs.branch else None
    rollouts = Rollouts(config, rollout, branches, algorithm, frozen, negative, encode, prompts, meshes, rules)
    weights = Weights(meshes.score, config.reward.offload)
    score, generate = _scoring(config, pipeline, rewards, meshes, programs, rollouts, encode, weights, rules)
    factor = config.ema.extrapolation
    extrapolate = jax.jit(partial(policy.extrapolated, factor=factor))

    def result(state: TrainState) -> Tree:
        return extrapolate(theta0, state.weights()) if factor != 1.0 else state.weights()

    evaluator = Evaluator(
        config, tuning_prompts, rewards, held_out, weights, generate, programs.num_frames, result, algorithm, frozen
    )
    fresh, abstract = _state(config, programs, rewards, meshes, theta0, rules)
    return Setup(policy, frozen, programs, algorithm, encode, rollouts, score, evaluator, result, fresh, abstract)


def _scoring(
    config: Any,
    pipeline: Pipeline,
    rewards: Sequence[Any],
    meshes: Meshes,
    programs: Programs,
    rollouts: Rollouts,
    encode: TextEncoding,
    weights: Weights,
    rules: Any,
) -> tuple[Callable[[Candidates], jax.Array], Callable[[Tree, Sequence[str], jax.Array], jax.Array]]:
    """The function that scores a step's candidates, and the one that makes whole videos for evaluations."""
    vae = pipeline.decoder_params
    # Scorers with devices of their own are busy with candidates, so evaluations decode elsewhere.
    evaluating = meshes.update if meshes.apart else meshes.score
    to_evaluate = place(vae, infer_shardings(vae, evaluating, rules))
    to_score = place(vae, infer_shardings(vae, meshes.score, rules)) if meshes.apart else to_evaluate
    every = tuple(range(programs.num_frames))
    decode, microbatch = programs.decode.function, config.rollout.microbatch
    decode_all = decode
    if programs.frames != every:
        decode_all = decode_program(pipeline, every, programs.latents, rollouts.videos, microbatch).function
    scores = Scores(rewards, weights, programs.num_frames, programs.frames, microbatch)

    def score(candidates: Candidates) -> jax.Array:
        with jax.set_mesh(meshes.score):
            videos = decode(to_score, bring(candidates.rollout.latents, meshes.score))
        with allowed():  # scorers may be a person's own code
            found = scores(videos, candidates.prompts)
        if meshes.score != meshes.update:
            found = jax.device_put(found, replicated(meshes.update))
        return jax.block_until_ready(found)

    def generate(trainable: Tree, prompts: Sequence[str], keys: jax.Array) -> jax.Array:
        found = rollouts.sample(trainable, encode(prompts), keys)
        latents = found.latents[:, -1] if isinstance(found, Trajectory) else found
        with jax.set_mesh(evaluating):
            return decode_all(to_evaluate, bring(latents, evaluating))

    return score, generate


def _state(
    config: Any, programs: Programs, rewards: Sequence[Any], meshes: Meshes, initial: Tree, rules: Any
) -> tuple[Callable[[], TrainState], TrainState]:
    """The function that makes the fresh state, and the state's shapes with shardings."""
    algorithm = programs.algorithm
    prefetched = None
    if meshes.apart:
        made = programs.candidates
        prefetched = jax.eval_shape(made.function, *made.arguments(made.batch))

    def fresh() -> TrainState:
        return init_state(
            initial,
            make_optimizer(config.optimizer),
            algorithm.init,
            len(dimension_names(rewards)),
            with_ema=config.ema.decay > 0.0,
            prefetched=prefetched,
        )

    shapes = jax.eval_shape(fresh)
    shardings = infer_state_shardings(shapes, meshes.update, algorithm.infer_shardings, rules)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return jax.jit(fresh, out_shardings=shardings), abstract
