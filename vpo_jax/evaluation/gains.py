"""What a policy has gained on the base model, as metrics of a run: pure functions of both models' scores.

Scores are {"scorer/dimension": [P]} of the same P prompts, sampled from the same noise.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from vpo_jax.evaluation.win_rate import win_share
from vpo_jax.runtime.metrics import standard_error_of


def gain(base: Mapping[str, Sequence[float]], scores: Mapping[str, np.ndarray], names: Sequence[str]) -> float:
    """Mean over the dimensions `names` of scores - base, in the base's standard deviations over prompts.

    A dimension in which all of the base's scores are equal counts in its own units.
    """
    gains = []
    for name in names:
        before = np.asarray(base[name], np.float32)  # [P]
        gains.append(float(np.mean(scores[name] - before)) / (float(before.std()) or 1.0))
    return float(np.mean(gains))


def metrics_against_base(
    base: Mapping[str, Sequence[float]],
    scores: Mapping[str, np.ndarray],
    trained: Sequence[str],
    held_out: Sequence[str],
) -> dict[str, float]:
    """What an evaluation adds to the metrics of a run.

    Args:
      base: scores of the base model.
      scores: scores of the policy; every dimension is in `trained` or in `held_out`.
      trained: dimensions of the scorers that train the policy.
      held_out: dimensions of the held-out scorers.

    Returns:
      "eval/gain" of the trained dimensions; for each dimension its mean, "eval/NAME" or "held_out/NAME", its win
      rate over the base, "eval/win_rate/NAME" or "held_out/win_rate/NAME", in [0, 1] with ties counted one half, and
      "standard_error/" before the mean's name: of its difference from the base, over prompts; none for one prompt.
    """
    metrics = {"eval/gain": gain(base, scores, trained)}
    for name, values in scores.items():
        place = "held_out" if name in held_out else "eval"
        metrics[f"{place}/{name}"] = float(np.mean(values))
        before = np.asarray(base[name], np.float32)
        metrics[f"{place}/win_rate/{name}"] = win_share(before, values)
        if len(values) > 1:
            error = float(np.std(values - before, ddof=1)) / len(values) ** 0.5
            metrics[standard_error_of(f"{place}/{name}")] = error
    return metrics
