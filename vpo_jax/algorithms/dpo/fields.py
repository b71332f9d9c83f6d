"""The config section `preference`: what its fields may hold."""

from collections.abc import Mapping

from vpo_jax.algorithms.dpo.selection import PAIRS, group_size
from vpo_jax.diffusion.process import DENSITIES
from vpo_jax.runtime.errors import UserError
from vpo_jax.runtime.fields import FLAG, POSITIVE, Field, Values, number, one_of, whole

FIELDS: Mapping[str, Field] = {
    "preference.pairs": one_of(*PAIRS),
    "preference.top_k": whole(1),
    "preference.beta": POSITIVE,
    "preference.margin": number(0),
    "preference.motion_tolerance": number(0),
    "preference.label_temperature": number(0, extra=" (0 = hard labels)"),
    "preference.winner_safeguard": FLAG,
    "preference.winner_safeguard_mu": number(0, 1),
    "preference.winner_penalty": number(0),
    "preference.anchor": number(0),
    "preference.max_pair_age": whole(0),
    "preference.caption_dropout": number(0, 1),
    "preference.timestep_low": number(0, 1),
    "preference.timestep_high": number(0, 1),
    "preference.timestep_density": one_of(*DENSITIES),
}


def check(values: Values) -> None:
    """Raises UserError where fields of a config, each allowed by itself, do not go together."""
    pairs, candidates, top_k = values["preference.pairs"], values["rollout.candidates"], values["preference.top_k"]
    if candidates < 2:
        raise UserError(f"rollout.candidates: {candidates} leaves nothing to prefer; give 2 or more")
    if pairs == "top_k" and 2 * top_k > candidates:
        raise UserError(
            f"preference.top_k: {top_k} best and {top_k} worst of rollout.candidates={candidates} would be the same"
            f" videos; choose at most {candidates // 2}"
        )
    if pairs == "listwise" and values["preference.label_temperature"] == 0.0:
        raise UserError("preference.label_temperature: pairs=listwise divides rewards by it; give a number above 0")
    microbatch, prompts = values["train.microbatch"], values["train.prompts_per_step"]
    learnt = prompts * group_size(pairs, candidates, top_k)
    if microbatch and learnt % (2 * microbatch):
        whole = f"train.prompts_per_step={prompts}"
        if learnt != 2 * prompts:
            whole = f"{learnt / 2:g}, half of the {learnt} videos that a step learns from"
        raise UserError(f"train.microbatch: {microbatch} does not divide {whole}; choose a divisor")
    if values["reward.devices"] and not values["preference.max_pair_age"]:
        raise UserError(
            "preference.max_pair_age: with reward.devices, candidates are one step old when they are scored;"
            " give 1 or more, or set reward.devices=0"
        )
    low, high = values["preference.timestep_low"], values["preference.timestep_high"]
    if low >= high:
        raise UserError(f"preference.timestep_low: {low} is not below preference.timestep_high={high}; lower it")
