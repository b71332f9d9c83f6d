"""Samplers by the name of their diffusers class, each an instance of the rule in `multistep`."""

from collections.abc import Mapping
from typing import Any

from vpo_jax.diffusion.config import resolve
from vpo_jax.diffusion.multistep import Coefficients, Sampler, SamplerState, sample
from vpo_jax.diffusion.schedules import alphas_cumprod
from vpo_jax.diffusion.solvers.ddim import make_ddim
from vpo_jax.diffusion.solvers.dpm_solver import make_dpm_solver
from vpo_jax.diffusion.solvers.euler import make_euler, make_flow_euler
from vpo_jax.diffusion.solvers.unipc import make_unipc
from vpo_jax.runtime.errors import UserError

__all__ = ["Coefficients", "Sampler", "SamplerState", "make_sampler", "sample"]


def make_sampler(
    config: Mapping[str, Any], num_inference_steps: int, name: str | None = None, eta: float = 0.0, first: int = 0
) -> Sampler:
    """The sampler of a scheduler_config.json, or, with `name`, what diffusers' `NAME.from_config(config)` would be.

    `eta` in [0, 1] is DDIM's share of fresh noise (1 is ancestral sampling); the other samplers ignore it, as
    diffusers' pipelines do. With `first` above 0 the steps before it are left out, as where diffusers begins from an
    image: the sampler begins at what `Sampler.noised` gives, and without a history. Raises UserError, by the field's
    name, for what is not honoured.
    """
    sampler = _make_sampler(config, num_inference_steps, name, eta, first)
    if not 0 <= first < len(sampler.timesteps):
        raise ValueError(f"first: {first} must be one of the {len(sampler.timesteps)} steps")
    return sampler.since(first) if first else sampler


def _make_sampler(config: Mapping[str, Any], steps: int, name: str | None, eta: float, first: int) -> Sampler:
    """All steps, of which those before `first` will be left out."""
    fields = resolve(config, name)
    total = fields["num_train_timesteps"]
    if not 1 <= steps <= total:
        raise UserError(f"num_inference_steps: {steps} must be between 1 and {total}, the trained steps")
    if not 0.0 <= eta <= 1.0:
        raise UserError(f"eta: {eta} must be between 0 and 1")
    name = fields["_class_name"]
    if name == "FlowMatchEulerDiscreteScheduler":
        return make_flow_euler(fields, steps)
    if name == "UniPCMultistepScheduler":
        return make_unipc(fields, steps, first)
    levels = alphas_cumprod(fields)
    if name == "DDIMScheduler":
        return make_ddim(fields, levels, steps, eta)
    if name == "DPMSolverMultistepScheduler":
        return make_dpm_solver(fields, levels, steps, first)
    return make_euler(fields, levels, steps)
