"""Signals that ask a launch to stop.

A run that is asked to stop ends after the current step, with a checkpoint. Before the first step of a launch there is
nothing to save, so with one process a signal then unwinds at once: ``StopNow``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from attrs import define, field

from gpt_simple.errors import Interruption
from gpt_simple.launch.signals import stop_on_signals


class StopNow(Interruption):
    """A stop before this launch finished a step."""


@define(eq=False)
class StopSignals:
    """The first signal that arrived (``reason``, empty before), and whether a signal interrupts now."""

    reason: str = ""
    _interrupts: bool = field(default=False, init=False)
    _before_exit: list[Callable[[], None]] = field(factory=list, init=False)

    def received(self, name: str) -> None:
        """Keep the first signal; raise StopNow while signals interrupt. Called by the handlers at any moment."""
        self.reason = self.reason or name
        if self._interrupts:
            self.stop_now(name)

    def stop_now(self, reason: str) -> NoReturn:
        """Raise StopNow."""
        self._interrupts = False  # the next signal must not interrupt the clean-up after this one
        raise StopNow(reason)

    @contextmanager
    def interrupting(self, enabled: bool) -> Iterator[None]:
        """Inside, a signal raises StopNow if ``enabled``, until ``defer`` is called."""
        self._interrupts = enabled
        try:
            yield
        finally:
            self._interrupts = False

    def defer(self) -> None:
        """From now on a signal takes effect at the end of the step: there is work to save."""
        self._interrupts = False

    @contextmanager
    def on_forced_exit(self, callback: Callable[[], None]) -> Iterator[None]:
        """Inside, a second Ctrl-C calls ``callback`` before it ends the process."""
        self._before_exit.append(callback)
        try:
            yield
        finally:
            self._before_exit.remove(callback)

    def forced_exit(self) -> None:
        """Run the callbacks, just before the process ends."""
        for callback in self._before_exit:
            callback()


@contextmanager
def stop_signals(pending: Sequence[str] = ()) -> Iterator[StopSignals]:
    """Install the handlers. ``pending``: a live list of signals that arrived while the program was loading."""
    signals = StopSignals()
    with stop_on_signals(signals.received, signals.forced_exit):
        for name in pending:
            signals.received(name)
        yield signals
