"""What hooks return: numbers for the log, and findings of a check."""

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

SEVERITIES: tuple[Severity, ...] = get_args(Severity)

COLUMNS = ("kind", "step", "tokens", "time", "nonfinite", "name", "level", "message")
"""Columns of ``metrics.jsonl``, which no metric replaces."""

VAL_LOSS = "eval/loss"
"""The metric of ``evaluate`` that is the run's validation loss, in nats per target token: "best" refers to it."""


@frozen
class Metric:
    """A number for the log, and how the values of several processes become one.

    ``value`` and ``weight`` are floats or 0-d tensors on the device, which are read only in the reduction. ``mean`` is
    weighted by ``weight``. The reduction is over the processes that return the metric; ``last`` is the value of the
    first of them, which is the main process if it returns the metric.
    """

    value: float | torch.Tensor
    weight: float | torch.Tensor = 1.0
    reduce: Reduction = "mean"


@frozen
class Finding:
    """One result of a check: a problem with a severity and a code.

    ``place`` is a dotted key of the configuration, shown with its file and line, or another location. ``hint`` says
    what to do. ``exit_code`` is that of the program for an ``error``. ``fields`` has the facts of the message for
    machines, as JSON values.
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
        """A finding for each problem of an error; ``place`` is for a problem without one."""
        exit_code = int(error.exit_code)
        return [cls("error", code, p.message, p.place or place, p.hint, exit_code) for p in error.problems]

    @property
    def problem(self) -> Problem:
        """The finding as a problem of an error."""
        return Problem(self.place, "", self.message, self.hint)
