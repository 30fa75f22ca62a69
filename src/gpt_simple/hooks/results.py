"""What plugins hand back: numbers for the log, and remarks of a check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from attrs import field, frozen

from gpt_simple.errors import GptSimpleError, Problem

if TYPE_CHECKING:
    import torch

Reduction = Literal["mean", "sum", "max", "min", "last"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
Severity = Literal["error", "warning", "info"]

VAL_LOSS = "eval/loss"
"""The metric of ``evaluate`` that is the run's validation loss, in nats per target token: "best" refers to it."""


@frozen
class Metric:
    """A number for the log, and how the values of several processes become one.

    ``value`` and ``weight`` may be floats or 0-d tensors on the device: they are read once, in one
    collective, when somebody looks. ``mean`` is weighted by ``weight``; ``last`` takes the value of the main
    process. Only processes that tell the metric count; without the main one ``last`` is of the next that does.
    """

    value: float | torch.Tensor
    weight: float | torch.Tensor = 1.0
    reduce: Reduction = "mean"


@frozen
class Finding:
    """One remark of a check: a problem with a severity and a code.

    ``place`` is a dotted key of the configuration, shown with its file and line, or anything else that says where.
    ``fields`` hold the facts of the message for machines, as JSON values.
    """

    severity: Severity
    code: str
    message: str
    place: str = ""
    hint: str = ""
    exit_code: int = 2
    fields: Mapping[str, Any] = field(factory=dict)

    @classmethod
    def of_error(cls, error: GptSimpleError, code: str, place: str = "") -> list[Finding]:
        """A finding for each problem of an error; ``place`` is that of a problem without one."""
        worst = int(error.exit_code)
        return [cls("error", code, p.message, p.place or place, p.hint, worst) for p in error.problems]

    @property
    def problem(self) -> Problem:
        """What an error carries of this finding."""
        return Problem(self.place, "", self.message, self.hint)
