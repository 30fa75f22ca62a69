"""Wishes of plugins and signal handlers, and the one vote that turns them into decisions.

Anybody may ask, at any time, also from a signal handler: asking only sets a field. Once per optimizer step all
processes agree, and only the agreed value is acted on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from attrs import define, field, frozen

from gpt_simple.engine.time_budget import StopNow
from gpt_simple.errors import PluginError


@frozen
class Verdict:
    """What all processes agreed on for this boundary. An empty string is no."""

    save: str = ""
    evaluate: str = ""
    stop: str = ""
    halt: str = ""
    ended: str = ""
    off: tuple[str, ...] = ()
    """Plugins that failed somewhere and are switched off everywhere."""

    @property
    def leave(self) -> bool:
        """Whether the loop ends here, before ``max_steps``."""
        return bool(self.stop or self.halt or self.ended)


_NOTHING = Verdict()


class Voters(Protocol):
    """All processes, as ``distributed.process_group.World`` has them."""

    def agree(self, flags: Sequence[int]) -> list[int]:
        """The element-wise maximum of everybody's flags, in one collective."""

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value."""


@define(slots=True)
class Control:
    """The wishes of this process; implements ``gpt_simple.hooks.run.Control``."""

    save_reason: str = ""
    evaluate_reason: str = ""
    stop_reason: str = ""
    halt_reason: str = ""
    ended_reason: str = ""
    skip: torch.Tensor | None = None
    plugins: tuple[str, ...] = ()
    """Names of the active plugins, in one order everywhere: whose metric has a name first."""
    outside: Callable[[], str] | None = None
    """Tells a reason to stop that no signal brought: the clock, a request in the run directory."""
    parting: Callable[[], None] = lambda: None
    """Called when the process is about to end at once, without a word from anybody else."""
    at_once: bool = False
    """Whether a signal unwinds instead of waiting for the end of the step; only where nothing would be lost."""
    _failed: set[str] = field(factory=set)
    _any: bool = field(default=False, alias="any")

    def save(self, reason: str) -> None:
        self.save_reason, self._any = self.save_reason or _words(reason), True

    def evaluate(self, reason: str) -> None:
        self.evaluate_reason, self._any = self.evaluate_reason or _words(reason), True

    def stop(self, reason: str) -> None:
        self.stop_reason, self._any = self.stop_reason or _words(reason), True

    def signalled(self, reason: str) -> None:
        """Called by the handlers of signals, at any moment."""
        self.stop(reason)
        if self.at_once:
            self.at_once = False  # the next signal must not break off what this one begins
            raise StopNow(reason)

    def halt(self, reason: str) -> None:
        self.halt_reason, self._any = self.halt_reason or _words(reason), True

    def end(self, reason: str) -> None:
        """The data are used up: the run is complete, whatever ``max_steps`` says."""
        self.ended_reason, self._any = self.ended_reason or reason, True

    def skip_step(self, flag: torch.Tensor) -> None:
        if not isinstance(flag, torch.Tensor) or flag.shape or flag.dtype is not torch.bool or flag.is_meta:
            given = f"{list(flag.shape)} {flag.dtype}" if isinstance(flag, torch.Tensor) else type(flag).__name__
            raise PluginError(f"run.control.skip_step was given a {given}; expected a 0-d bool tensor on the device")
        self.skip = flag if self.skip is None else self.skip | flag

    def switch_off(self, plugin: str) -> None:
        """A plugin failed in this process: the others switch it off as well."""
        self._failed.add(plugin)

    def is_leaving(self) -> bool:
        """Whether this process wants to leave the loop, now that it has looked outside."""
        if not self.stop_reason and self.outside is not None and (reason := self.outside()):
            self.stop(reason)
        return bool(self.stop_reason or self.halt_reason)

    def vote(self, voters: Voters | None) -> Verdict:
        """Agree with all processes (None: there is one) and clear what was acted on. A wish to leave is final."""
        leaving = self.is_leaving()
        if voters is None and not (leaving or self._any):
            return _NOTHING
        mine = [self.save_reason, self.evaluate_reason, self.stop_reason, self.halt_reason, self.ended_reason]
        off: tuple[str, ...] = ()
        if voters is not None:
            flags = [bool(reason) for reason in mine] + [name in self._failed for name in self.plugins]
            agreed = voters.agree(flags)
            # Words cost a second collective: only where the loop ends anyway.
            words = voters.gather(mine) if any(agreed[2 : len(mine)]) else [mine]
            mine = [
                next((reason for reason in reasons if reason), "another process asked for it") if yes else ""
                for yes, reasons in zip(agreed, zip(*words, strict=True), strict=False)
            ]
            off = tuple(name for name, yes in zip(self.plugins, agreed[len(mine) :], strict=True) if yes)
            self._failed.clear()
        self.save_reason = self.evaluate_reason = ""
        self._any = bool(self.ended_reason)
        save, evaluate, stop, halt, ended = mine
        return Verdict(save, evaluate, stop, halt, ended, off)


def _words(reason: str) -> str:
    if not isinstance(reason, str) or not reason:
        raise PluginError(f"run.control was given {reason!r} as a reason; expected text that says why")
    return reason
