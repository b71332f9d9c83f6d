"""The part of a run's state that is no array; one JSON object in every checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """State that is no array and has to survive a restart.

    Attributes:
      prompts: fingerprint of the training prompts.
      clock: seconds by phase since the run began.
      base_scores: "scorer/dimension" -> the initial policy's score of each tuning prompt; None before the first
        evaluation.
      evaluations: metrics of every evaluation, oldest first; the first one is the initial policy's.
    """

    prompts: str
    clock: Mapping[str, float] = dataclasses.field(default_factory=dict)
    base_scores: Mapping[str, list[float]] | None = None
    evaluations: tuple[Mapping[str, float], ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return dataclasses.asdict(self) | {"evaluations": [dict(metrics) for metrics in self.evaluations]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "RunRecord":
        """The inverse of `as_json`."""
        return cls(**{**value, "evaluations": tuple(value["evaluations"])})

    def with_evaluation(self, metrics: Mapping[str, float]) -> "RunRecord":
        """The record with one evaluation more."""
        return dataclasses.replace(self, evaluations=(*self.evaluations, metrics))
