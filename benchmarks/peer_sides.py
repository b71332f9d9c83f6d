"""The two sides of benchmarks/peer.py: a rollout and an update of the embedded job, here and in PyTorch.

Both learn merged adapters: the kernel of each layer is W + (alpha / rank) A B, computed once a call from its factors.
PEFT computes two further layers beside each layer; with layers as small as these that takes 1.3 times as long, forward
and backward (16 videos, one core). PyTorch samples with the merged kernels, and its reference has no adapters.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from children import serve

from vpo_jax.algorithms.dpo.selection import Groups
from vpo_jax.algorithms.dpo.update import Noised
from vpo_jax.checkpoints.lora_files import torch_factors
from vpo_jax.data.prompts import load_prompts
from vpo_jax.pipeline import SHIPPED, load_pipeline
from vpo_jax.rewards.loading import load_rewards
from vpo_jax.runtime import cli
from vpo_jax.runtime.backend import keep_compiled_programs, keep_freed_memory, share_cores
from vpo_jax.runtime.mesh import make_meshes
from vpo_jax.runtime.trees import flatten, unflatten
from vpo_jax.training.check import check, cpu_devices
from vpo_jax.training.rollouts import make_candidate_keys
from vpo_jax.training.setup import make_setup

PRESETS = {"group": "", "pairs": ":pairs"}  # of configs/vpo.py
INPUTS = "inputs.npz"
_MOVED = 0.01  # deviation of B, so that the policy is not the reference and A has a gradient
_SMALL = {"train.prompts_per_step": 2, "rollout.candidates": 2, "rollout.microbatch": 2,
          "rollout.num_inference_steps": 2}  # fmt: skip

Arrays = dict[str, np.ndarray]


class Case(NamedTuple):
    """What a process measures.

    Attributes:
      side: ours, eager or compiled.
      cores: how many its process may use.
      update: a key of `PRESETS`.
      passes: forward passes of PyTorch's update, 3 or 2.
      small: whether sizes are those of a test.
      folder: of the inputs, which ours writes, and of what each process computed from them.
    """

    side: str
    cores: int
    update: str
    passes: int
    small: bool
    folder: str

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.side}-{self.cores}"


def config_of(case: Case) -> Any:
    """The embedded job's config, checked."""
    config = cli.load_config(f"configs/vpo.py{PRESETS[case.update]}")
    config.rollout.guidance_scale = 2.0  # as a large model samples
    if case.small:
        config.update_from_flattened_dict(_SMALL)
    check(config)
    return config


def make_side(case: Case) -> Callable[..., dict[str, Any]]:
    """`run(stage) -> {"seconds": ..., "cores": ...}`; what a stage's first call computes goes to NAME-STAGE.npz."""
    keep_freed_memory()  # for PyTorch as well: it allocates with malloc too
    config = config_of(case)
    stages = _ours(case, config) if case.side == "ours" else _torch(case, config)
    known: set[str] = set()

    def run(stage: str) -> dict[str, Any]:
        began = time.perf_counter()
        found = jax.block_until_ready(stages[stage]())
        seconds = time.perf_counter() - began
        if stage not in known:
            known.add(stage)
            write_arrays(Path(case.folder, f"{case.name}-{stage}.npz"), arrays_of(found))
        return {"seconds": seconds, "cores": len(os.sched_getaffinity(0))}

    return run


def write_arrays(file: Path, arrays: Mapping[str, Any]) -> None:
    """An .npz file."""
    named: Any = {name: np.asarray(array) for name, array in arrays.items()}
    np.savez(file, **named)


def arrays_of(found: Mapping[str, Any]) -> Arrays:
    """What a stage computed, in PyTorch's layout; latents [B, C, F, h, w], gradients as the optimizer meets them."""
    if "moments" in found:  # Adam's first update leaves a share of the gradient
        gradient = jax.tree.map(lambda x: np.asarray(x) / found["share"], found["moments"])
        factors = {f"gradient/{name}": x for name, x in torch_factors(gradient).items()}
        return {"loss": np.asarray(found["loss"]), "norm": np.asarray(found["norm"])} | factors
    if "grads" in found:
        factors = {f"gradient/{name}": x.grad.numpy() for name, x in found["grads"].items()}
        return {"loss": found["loss"].numpy(), "norm": found["norm"].numpy()} | factors
    latents = found["latents"]
    return {"latents": _channels_first(latents) if isinstance(latents, jax.Array) else latents.numpy()}


def _channels_first(videos: Any) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(np.asarray(videos), -1, 1))


def _ours(case: Case, config: Any) -> dict[str, Callable[[], dict[str, Any]]]:
    keep_compiled_programs()
    share_cores(cpu_devices(config))
    meshes = make_meshes(config.mesh)
    pipeline = load_pipeline(config.model.path)
    rewards = load_rewards(config.reward.scorers, training=True, settings=config.reward)
    prompts = load_prompts(config.data.prompts)
    jax.set_mesh(meshes.update)
    setup = make_setup(config, pipeline, rewards, meshes, prompts)
    number, candidates = config.train.prompts_per_step, config.rollout.candidates
    keys = make_candidate_keys(config.seed, number, candidates)(0)
    text = setup.encode(prompts[:number])
    rows = jax.tree.map(lambda x: jnp.repeat(x, candidates, axis=0), text)

    rng = np.random.default_rng(0)
    theta = {
        path: np.asarray(leaf) if path.endswith("lora_A") else _MOVED * rng.standard_normal(leaf.shape, np.float32)
        for path, leaf in flatten(setup.frozen.initial).items()
    }
    state = setup.fresh_state()
    groups = _groups(rng, state.algorithm.buffer, text)
    state = state._replace(policy=unflatten(theta), algorithm=state.algorithm._replace(buffer=groups))
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, setup.abstract_state))
    groups = state.algorithm.buffer
    algorithm: Any = setup.algorithm
    noised = algorithm.draw(groups, setup.frozen.empty_text, state.step, np.int32(0))
    shape = setup.programs.latents.shape
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.split(key)[0], shape, jnp.float32))(keys)
    inputs = Path(case.folder, INPUTS)
    if not inputs.exists():
        negative = setup.encode([config.rollout.negative_prompt] * number)
        _write_inputs(inputs, noise, rows, negative, groups, noised, unflatten(theta))

    def rollout() -> dict[str, Any]:
        return {"latents": setup.rollouts.sample(state.policy, rows, keys)}

    def update() -> dict[str, Any]:
        nonlocal state
        state, metrics = algorithm.update(state, setup.frozen, 0)
        # On the host: in operators of their own, the few numbers and the many gradients take as long as the update.
        mean = {name: total / count for name, (total, count) in jax.device_get(metrics).items()}
        loss = mean["loss/preference"] + config.preference.anchor * mean["loss/anchor"]
        (adam,) = [one for one in jax.tree.leaves(state.optimizer, is_leaf=_is_adam) if _is_adam(one)]
        share = 1 - config.optimizer.b1
        return {"loss": loss, "norm": mean["loss/gradient_norm"], "moments": adam.mu, "share": share}

    return {"rollout": rollout, "update": update}


def _is_adam(node: Any) -> bool:
    return hasattr(node, "mu")


def _groups(rng: np.random.Generator, like: Groups, text: Any) -> Groups:
    """Candidates that are all learnt from, the best first; their latents are unit Gaussian, as a real model's are."""
    prompts, size = like.learnt.shape
    rewards = -np.sort(-rng.standard_normal((prompts, size), np.float32), axis=1)
    return Groups(
        latents=jnp.asarray(rng.standard_normal(like.latents.shape, np.float32)),
        text=text,
        rewards=jnp.asarray(rewards),
        preferred=jnp.asarray(rewards[:, :, None] > rewards[:, None, :]),
        learnt=jnp.ones((prompts, size), bool),
        mask=jnp.ones(prompts, bool),
        slot=jnp.arange(prompts, dtype=jnp.int32),
        step=jnp.zeros(prompts, jnp.int32),
    )


def _write_inputs(
    file: Path, noise: jax.Array, rows: Any, negative: Any, groups: Groups, noised: Noised, policy: Any
) -> None:
    texts = {"text": rows.hidden, "negative": negative.hidden[0], "noised_text": noised.text.hidden}
    at = {"noised": _channels_first(noised.latents), "target": _channels_first(noised.target)}
    factors = {f"policy/{name}": x for name, x in torch_factors(policy).items()}
    more = {"noise": _channels_first(noise), "timesteps": noised.timesteps, "rewards": groups.rewards}
    write_arrays(file, texts | at | factors | more)


def _torch(case: Case, config: Any) -> dict[str, Callable[[], dict[str, Any]]]:
    import diffusers
    import torch

    torch.set_num_threads(case.cores)
    folder = SHIPPED[config.model.path]
    unet: Any = diffusers.UNet3DConditionModel.from_pretrained(folder, subfolder="unet").eval().requires_grad_(False)
    name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    scheduler = getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler")
    given = {key: torch.from_numpy(x) for key, x in np.load(Path(case.folder, INPUTS)).items()}
    policy = {key.removeprefix("policy/"): x.requires_grad_() for key, x in given.items() if key.startswith("policy/")}
    layers = [key.removesuffix(".lora_A") for key in policy if key.endswith(".lora_A")]
    frozen, scale = dict(unet.named_parameters()), config.lora.alpha / config.lora.rank
    average = [x.detach().clone() for x in policy.values()]

    def merged(adapters: dict[str, Any]) -> dict[str, Any]:
        def of(layer: str) -> Any:
            kernel = frozen[f"{layer}.weight"]
            product = adapters[f"{layer}.lora_B"].flatten(1) @ adapters[f"{layer}.lora_A"].flatten(1)
            return kernel + scale * product.view_as(kernel)

        return {f"{layer}.weight": of(layer) for layer in layers}

    def call(kernels: dict[str, Any], latents: Any, timesteps: Any, text: Any) -> Any:
        inputs = {"encoder_hidden_states": text}
        return torch.func.functional_call(unet, kernels, (latents, timesteps), inputs).sample

    def call_adapted(adapters: dict[str, Any], latents: Any, timesteps: Any, text: Any) -> Any:
        return call(merged(adapters), latents, timesteps, text)

    predict: Callable[..., Any] = call
    predict_adapted: Callable[..., Any] = call_adapted
    if case.side == "compiled":
        predict, predict_adapted = (torch.compile(function, dynamic=False) for function in (call, call_adapted))

    @torch.no_grad()
    def rollout() -> dict[str, Any]:
        kernels, found = merged(policy), []
        scheduler.set_timesteps(config.rollout.num_inference_steps)
        size = config.rollout.microbatch
        for noise, text in zip(given["noise"].split(size), given["text"].split(size), strict=True):
            latents = noise * scheduler.init_noise_sigma
            both = torch.cat([given["negative"].expand_as(text), text])
            for timestep in scheduler.timesteps:
                twice = scheduler.scale_model_input(torch.cat([latents] * 2), timestep)
                without, conditional = predict(kernels, twice, timestep.expand(len(twice)), both).chunk(2)
                guided = without + config.rollout.guidance_scale * (conditional - without)
                latents = scheduler.step(guided, timestep, latents).prev_sample
            found.append(latents)
        return {"latents": torch.cat(found)}

    options = config.optimizer
    optimizer = torch.optim.AdamW(policy.values(), options.learning_rate, (options.b1, options.b2), options.eps,
                                  options.weight_decay, fused=True)  # fmt: skip
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / options.warmup_steps, 1.0, options.warmup_steps - 1)
    preference_loss = _preference_loss(case, config, given["rewards"])
    inputs = [given[key] for key in ("noised", "timesteps", "noised_text")]

    def squared_error(a: Any, b: Any) -> Any:
        return (a - b).square().flatten(1).mean(1)

    def update() -> dict[str, Any]:
        optimizer.zero_grad()
        with torch.no_grad():
            initial = predict({}, *inputs)
            reference = squared_error(initial, given["target"])
            before = squared_error(predict_adapted(policy, *inputs), given["target"]) if case.passes == 3 else None
        predictions = predict_adapted(policy, *inputs)
        errors = squared_error(predictions, given["target"])
        if before is None:
            learnt = loss = preference_loss(errors, reference)
        else:  # as ours: the gradient's constants come from a pass before
            loss = preference_loss(before.requires_grad_(), reference)
            (constants,) = torch.autograd.grad(loss, before)
            learnt = (constants * errors).sum()
        # Every candidate is learnt from, so the mean over groups of means over a group is one mean.
        anchor = config.preference.anchor * squared_error(predictions, initial).mean()
        (learnt + anchor).backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.values(), options.clip_norm, foreach=True)
        optimizer.step()
        warmup.step()
        with torch.no_grad():
            torch.optim.swa_utils.get_ema_multi_avg_fn(config.ema.decay)(average, list(policy.values()), None)
        return {"loss": (loss + anchor).detach(), "norm": norm, "grads": policy}

    return {"rollout": rollout, "update": update}


def _preference_loss(case: Case, config: Any, rewards: Any) -> Callable[[Any, Any], Any]:
    """`loss(errors of the policy [V], of the reference [V])`: the preset's, in PyTorch."""
    import torch
    from torch.nn.functional import softplus

    preference = config.preference
    advantages = rewards - rewards.mean(1, keepdim=True)
    shares = 2 * advantages / advantages.abs().sum(1, keepdim=True)
    if case.update == "pairs":
        label = torch.sigmoid((rewards[:, 0] - rewards[:, 1]) / preference.label_temperature)
    else:
        label = torch.ones(len(rewards))

    def loss(errors: Any, reference: Any) -> Any:
        change = (errors - reference).view_as(rewards)
        logit = -0.5 * preference.beta * (shares * change).sum(1)  # of a pair the shares are 1 and -1
        return (softplus(-logit) + (1 - label) * logit).mean()

    return loss


if __name__ == "__main__":
    serve(lambda: make_side(Case(**json.loads(sys.argv[1]))))
