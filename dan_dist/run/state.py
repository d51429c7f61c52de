"""Where a run is: the part of a checkpoint that is neither learned nor configured."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pydantic import ConfigDict
from torch import Tensor


@dataclass
class TrainState:
    """A run's progress; a new run is at step 0. Checkpoints hold every field by its name."""

    # Where the types of one from a file are checked
    __pydantic_config__ = ConfigDict(
        strict=True, arbitrary_types_allowed=True, revalidate_instances="always"
    )

    step: int = 0  # optimiser steps whose weights are in the checkpoint
    best: dict[str, float] = field(default_factory=dict)  # metrics and epoch of the best evaluation
    metrics: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    evaluated: int | None = None  # step of the last evaluation
    right: Tensor | None = None  # (judged,) bool: what the last evaluation had right
    skipped: int = 0  # steps so far that were left out, as they were not finite
    replaced: int = 0  # images so far that stood in for damaged ones
    replaced_since: int | None = None  # the first step with such an image
    # losses and gradient norm of each step since the last log line: log lines do not depend on
    # interruptions
    figures: list[list[float]] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)  # of the training images, likewise
    run_id: str | None = None  # MLflow's

    @classmethod
    def from_checkpoint(cls, content: Mapping[str, Any]) -> "TrainState":
        """The state in a checkpoint; fields that earlier versions lack have their defaults."""
        return cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, not copied."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
