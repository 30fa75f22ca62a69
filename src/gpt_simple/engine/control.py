"""Requests of plugins, and the one decision of all ranks that answers them.

A plugin may ask at any time: asking only records the request. Once per optimizer step all ranks agree in one
collective, and only the agreed values are acted on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from attrs import define, evolve, field, frozen

from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.errors import PluginError

StopCondition = Callable[[], str]
"""Returns a reason to stop (a signal, the time budget, a request in the run directory), or an empty string."""

_KINDS = ("save", "evaluate", "rebuild", "stop", "halt", "finish")
"""What can be requested, in the order of the collective."""
_FINAL = _KINDS[3:]
"""What ends the run."""

_THROTTLE_SECONDS = 1.0


@frozen
class Decision:
    """What all ranks agreed on for this step boundary. An empty string is no."""

    save: str = ""
    evaluate: str = ""
    stop: str = ""
    halt: str = ""
    finish: str = ""
    rebuild: str = ""
    disabled_plugins: tuple[str, ...] = ()
    """Plugins that failed on some rank and are switched off on all."""
    failures: tuple[str, ...] = ()
    """The message for each of them, empty if the main rank has logged it."""

    def merged(self, later: Decision) -> Decision:
        """This decision with the requests of a ``later`` one of the same boundary; the first reason of each is kept."""
        return evolve(self, **{kind: getattr(self, kind) or getattr(later, kind) for kind in _KINDS})

    @property
    def should_stop(self) -> bool:
        """Whether the loop ends here, before ``max_steps``."""
        return self.interrupts or bool(self.finish)

    @property
    def interrupts(self) -> bool:
        """Whether the run is to end quickly: without another evaluation."""
        return bool(self.stop or self.halt)


_NOTHING = Decision()


@define(eq=False)
class Requests:
    """The requests of this rank's plugins and of the engine; implements ``gpt_simple.hooks.run.Control``."""

    reasons: dict[str, str] = field(factory=dict, init=False)
    """The first reason for each kind of request since the last decision."""
    failed_plugins: dict[str, str] = field(factory=dict, init=False)
    """Plugins that failed on this rank since the last decision, each with a message that is still to be logged."""
    _asking: str = field(default="", init=False)
    """The plugin whose ``on_gradients`` runs."""
    _skips: dict[str, torch.Tensor] = field(factory=dict, init=False)
    """The flags of ``skip_step`` for this step, by plugin."""

    def save(self, reason: str) -> None:
        self._request("save", reason)

    def evaluate(self, reason: str) -> None:
        self._request("evaluate", reason)

    def stop(self, reason: str) -> None:
        self._request("stop", reason)

    def halt(self, reason: str) -> None:
        self._request("halt", reason)

    def finish(self, reason: str) -> None:
        self._request("finish", reason)

    def rebuild_optimizer(self, reason: str) -> None:
        self._request("rebuild", reason)

    def _request(self, kind: str, reason: str) -> None:
        if not isinstance(reason, str) or not reason:
            raise PluginError(f"run.control was given {reason!r} as a reason; expected text that says why")
        self.reasons.setdefault(kind, reason)

    def skip_step(self, flag: torch.Tensor) -> None:
        if not isinstance(flag, torch.Tensor) or flag.shape or flag.dtype is not torch.bool or flag.is_meta:
            given = f"{list(flag.shape)} {flag.dtype}" if isinstance(flag, torch.Tensor) else type(flag).__name__
            raise PluginError(f"run.control.skip_step was given a {given}; expected a 0-d bool tensor on the device")
        if not self._asking:
            raise PluginError(
                "run.control.skip_step was used outside of on_gradients", hint="keep the flag until on_gradients"
            )
        earlier = self._skips.get(self._asking)
        self._skips[self._asking] = flag if earlier is None else earlier | flag

    def allow_skips(self, plugin: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
        """A plugin's ``on_gradients``, in which ``skip_step`` may be used and is attributed to the plugin."""

        @wraps(implementation)
        def call(*arguments: Any) -> Any:
            self._asking = plugin
            try:
                return implementation(*arguments)
            finally:
                self._asking = ""

        return call

    def take_skips(self) -> Mapping[str, torch.Tensor]:
        """The flags of ``skip_step`` for this step, by plugin. The next step starts without any."""
        skips, self._skips = self._skips, {}
        return skips

    def disable(self, plugin: str, message: str = "") -> None:
        """Ask all ranks to switch off a plugin that failed on this one, and the main rank to log ``message``."""
        self.failed_plugins[plugin] = message

    def clear(self) -> None:
        """Remove what was decided. A request to stop, halt or finish is final and stays."""
        self.reasons = {kind: reason for kind, reason in self.reasons.items() if kind in _FINAL}
        self.failed_plugins.clear()


@frozen(eq=False)
class Control:
    """Decides for all ranks. ``plugins``: names of the active plugins, in the same order on every rank."""

    dist: ProcessGroup
    requests: Requests
    stop_conditions: Sequence[StopCondition]
    plugins: tuple[str, ...] = ()

    def is_leaving(self) -> bool:
        """Whether this rank is to leave the loop. A stop condition that was met once stays met."""
        self._apply_stop_conditions()
        return "stop" in self.requests.reasons or "halt" in self.requests.reasons

    def any_leaving(self) -> bool:
        """Whether any rank is to leave; all ranks call it together."""
        return bool(self.dist.all_reduce_max([self.is_leaving()])[0])

    def any_finishing(self) -> bool:
        """Whether a plugin of any rank has asked to finish; all ranks call it together."""
        return bool(self.dist.all_reduce_max(["finish" in self.requests.reasons])[0])

    def decide(self) -> Decision:
        """Agree with all ranks, and clear what is acted on."""
        self._apply_stop_conditions()
        requests = self.requests
        if self.dist.size == 1 and not requests.reasons:
            return _NOTHING
        mine = [requests.reasons.get(kind, "") for kind in _KINDS]
        failed = [name in requests.failed_plugins for name in self.plugins]
        agreed = self.dist.all_reduce_max([*map(bool, mine), *failed])
        # Texts need a second collective: only where the run ends or is built anew anyway, or a plugin has failed.
        texts = self.dist.gather(mine) if any(agreed[2 : len(_KINDS)]) else [mine]
        save, evaluate, rebuild, stop, halt, finish = (
            next(filter(None, given), "another process asked for it") if yes else ""
            for yes, given in zip(agreed, zip(*texts, strict=True), strict=False)
        )
        disabled = tuple(name for name, yes in zip(self.plugins, agreed[len(_KINDS) :], strict=True) if yes)
        own = [requests.failed_plugins.get(name) for name in disabled]
        messages = zip(*self.dist.gather(own), strict=False) if disabled else ()
        failures = tuple(next((text for text in given if text is not None), "") for given in messages)
        requests.clear()
        return Decision(save, evaluate, stop, halt, finish, rebuild, disabled, failures)

    def _apply_stop_conditions(self) -> None:
        if "stop" not in self.requests.reasons:
            for condition in self.stop_conditions:
                if reason := condition():
                    self.requests.stop(reason)
                    return


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
