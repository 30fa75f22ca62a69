"""Requests of plugins, and the one decision of all ranks that answers them.

A plugin may ask at any time: asking only sets a field. Once per optimizer step all ranks agree in one collective, and
only the agreed values are acted on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from attrs import define, field, frozen

from gpt_simple.errors import PluginError

StopCondition = Callable[[], str]
"""Returns a reason to stop (a signal, the time budget, a request in the run directory), or an empty string."""

_THROTTLE_SECONDS = 1.0


@frozen
class Decision:
    """What all ranks agreed on for this step boundary. An empty string is no."""

    save: str = ""
    evaluate: str = ""
    stop: str = ""
    halt: str = ""
    end: str = ""
    disabled_plugins: tuple[str, ...] = ()
    """Plugins that failed on some rank and are switched off on all."""

    @property
    def should_stop(self) -> bool:
        """Whether the loop ends here, before ``max_steps``."""
        return bool(self.stop or self.halt or self.end)


_NOTHING = Decision()


class Ranks(Protocol):
    """The collectives that a decision needs; ``distributed.process_group`` has them."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    def all_reduce_max(self, flags: Sequence[int]) -> list[int]:
        """The element-wise maximum over all ranks, in one collective."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""


@define(eq=False)
class Requests:
    """The requests of this rank's plugins and of the engine; implements ``gpt_simple.hooks.run.Control``."""

    save_reason: str = ""
    evaluate_reason: str = ""
    stop_reason: str = ""
    halt_reason: str = ""
    end_reason: str = ""
    failed_plugins: set[str] = field(factory=set)
    pending: bool = False
    """Whether anything was requested since the last decision."""
    _skip: torch.Tensor | None = field(default=None, init=False)

    def save(self, reason: str) -> None:
        self.save_reason, self.pending = self.save_reason or _text(reason), True

    def evaluate(self, reason: str) -> None:
        self.evaluate_reason, self.pending = self.evaluate_reason or _text(reason), True

    def stop(self, reason: str) -> None:
        self.stop_reason, self.pending = self.stop_reason or _text(reason), True

    def halt(self, reason: str) -> None:
        self.halt_reason, self.pending = self.halt_reason or _text(reason), True

    def end(self, reason: str) -> None:
        """The data are used up: the run is complete before ``max_steps``."""
        self.end_reason, self.pending = self.end_reason or _text(reason), True

    def skip_step(self, flag: torch.Tensor) -> None:
        if not isinstance(flag, torch.Tensor) or flag.shape or flag.dtype is not torch.bool or flag.is_meta:
            given = f"{list(flag.shape)} {flag.dtype}" if isinstance(flag, torch.Tensor) else type(flag).__name__
            raise PluginError(f"run.control.skip_step was given a {given}; expected a 0-d bool tensor on the device")
        self._skip = flag if self._skip is None else self._skip | flag

    def take_skip(self) -> torch.Tensor | None:
        """The flag of ``skip_step`` for this step, or None. The next step starts without one."""
        skip, self._skip = self._skip, None
        return skip

    def disable(self, plugin: str) -> None:
        """Ask all ranks to switch off a plugin that failed on this one."""
        self.failed_plugins.add(plugin)

    def clear(self) -> None:
        """Forget what was decided. A request to leave is final and stays."""
        self.save_reason = self.evaluate_reason = ""
        self.failed_plugins.clear()
        self.pending = bool(self.end_reason)


@frozen(eq=False)
class Control:
    """Decides for all ranks. ``plugins``: names of the active plugins, in the same order on every rank."""

    dist: Ranks
    requests: Requests
    stop_conditions: Sequence[StopCondition]
    plugins: tuple[str, ...] = ()

    def is_leaving(self) -> bool:
        """Whether this rank wants to leave the loop. A stop condition that was met once stays met."""
        requests = self.requests
        if not requests.stop_reason and (reason := self._met_condition()):
            requests.stop(reason)
        return bool(requests.stop_reason or requests.halt_reason)

    def any_leaving(self) -> bool:
        """Whether any rank wants to leave; all ranks call it together."""
        leaving = self.is_leaving()
        return bool(self.dist.all_reduce_max([leaving])[0]) if self.dist.size > 1 else leaving

    def decide(self) -> Decision:
        """Agree with all ranks and clear what is acted on."""
        requests, leaving = self.requests, self.is_leaving()
        if self.dist.size == 1 and not (leaving or requests.pending):
            return _NOTHING
        mine = [
            requests.save_reason,
            requests.evaluate_reason,
            requests.stop_reason,
            requests.halt_reason,
            requests.end_reason,
        ]
        disabled: tuple[str, ...] = ()
        if self.dist.size > 1:
            flags = [bool(reason) for reason in mine] + [name in requests.failed_plugins for name in self.plugins]
            agreed = self.dist.all_reduce_max(flags)
            # Text needs a second collective: only where the loop ends anyway.
            texts = self.dist.gather(mine) if any(agreed[2 : len(mine)]) else [mine]
            mine = [
                next((reason for reason in reasons if reason), "another process asked for it") if yes else ""
                for yes, reasons in zip(agreed, zip(*texts, strict=True), strict=False)
            ]
            disabled = tuple(name for name, yes in zip(self.plugins, agreed[len(mine) :], strict=True) if yes)
        requests.clear()
        save, evaluate, stop, halt, end = mine
        return Decision(save, evaluate, stop, halt, end, disabled)

    def _met_condition(self) -> str:
        return next((reason for condition in self.stop_conditions if (reason := condition())), "")


def throttled(condition: StopCondition) -> StopCondition:
    """``condition``, evaluated at most once a second: a remote file system answers slowly."""
    evaluated = time.monotonic()

    def evaluate() -> str:
        nonlocal evaluated
        if (now := time.monotonic()) - evaluated < _THROTTLE_SECONDS:
            return ""
        evaluated = now
        return condition()

    return evaluate


def _text(reason: str) -> str:
    if not isinstance(reason, str) or not reason:
        raise PluginError(f"run.control was given {reason!r} as a reason; expected text that says why")
    return reason
