"""Wishes of plugins and signal handlers, and the one vote that turns them into decisions.

Anybody may ask, at any time, also from a signal handler: asking only sets a field. Once per optimizer step all
processes agree, and only the agreed value is acted on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from attrs import define, field, frozen

_FIELDS = ("save", "evaluate", "stop", "halt", "ended")


@frozen
class Verdict:
    """What all processes agreed on for this boundary. An empty string is no."""

    save: str = ""
    evaluate: str = ""
    stop: str = ""
    halt: str = ""
    ended: str = ""

    @property
    def leave(self) -> bool:
        """Whether the loop ends here, before ``max_steps``."""
        return bool(self.stop or self.halt or self.ended)


_NOTHING = Verdict()


@define(slots=True)
class Control:
    """The wishes of this process; implements ``gpt_simple.hooks.run.Control``."""

    save_reason: str = ""
    evaluate_reason: str = ""
    stop_reason: str = ""
    halt_reason: str = ""
    ended_reason: str = ""
    skip: torch.Tensor | None = None
    _any: bool = field(default=False, alias="any")

    def save(self, reason: str) -> None:
        self.save_reason, self._any = self.save_reason or reason, True

    def evaluate(self, reason: str) -> None:
        self.evaluate_reason, self._any = self.evaluate_reason or reason, True

    def stop(self, reason: str) -> None:
        self.stop_reason, self._any = self.stop_reason or reason, True

    def halt(self, reason: str) -> None:
        self.halt_reason, self._any = self.halt_reason or reason, True

    def end(self, reason: str) -> None:
        """The data are used up: the run is complete, whatever ``max_steps`` says."""
        self.ended_reason, self._any = self.ended_reason or reason, True

    def skip_step(self, flag: torch.Tensor) -> None:
        self.skip = flag if self.skip is None else self.skip | flag

    @property
    def leaving(self) -> bool:
        """Whether this process wants to leave the loop."""
        return bool(self.stop_reason or self.halt_reason)

    def vote(self, agree: Callable[[Sequence[int]], list[int]] | None) -> Verdict:
        """Agree with all processes (``agree`` takes the element-wise maximum) and clear what was acted on.

        A wish to leave stays: it is final.
        """
        if agree is None and not self._any:
            return _NOTHING
        mine = [self.save_reason, self.evaluate_reason, self.stop_reason, self.halt_reason, self.ended_reason]
        if agree is not None:
            agreed = agree([bool(reason) for reason in mine])
            mine = [(reason or "another process") if yes else "" for reason, yes in zip(mine, agreed, strict=True)]
        self.save_reason = self.evaluate_reason = ""
        self._any = self.leaving or bool(self.ended_reason)
        return Verdict(**dict(zip(_FIELDS, mine, strict=True)))
