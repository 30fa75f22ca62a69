"""Signals ask for a stop; the step loop stops.

A handler only calls back and returns, so it is safe at any moment. A second Ctrl-C leaves at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from gpt_simple.errors import ExitCode

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

# A terminal's Ctrl-C can reach a process twice, from the terminal and from a launcher: that is one press.
ONE_PRESS_SECONDS = 0.3


def asking() -> tuple[signal.Signals, ...]:
    """The signals that ask for a stop; not a hang-up that ``nohup`` has this process ignore."""
    hung_up_is_nothing = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in STOPPING if number != signal.SIGHUP or not hung_up_is_nothing)


@contextmanager
def stop_on_signals(stop: Callable[[str], None], parting: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Call ``stop`` with the name of a signal when one arrives; the handlers found are put back afterwards.

    ``parting`` is called, once, before a second Ctrl-C ends the process. Does nothing outside the main thread, where
    Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[float] = []
    leaving = False

    def leave() -> NoReturn:
        nonlocal leaving
        again, leaving = leaving, True
        try:
            if not again:
                os.write(2, b"\nsecond Ctrl-C: leaving at once, without a checkpoint of the last steps\n")
                parting()
        finally:
            os._exit(ExitCode.FORCED)

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if pressed and now - pressed[0] > ONE_PRESS_SECONDS:
                leave()
            pressed.append(now)
        stop(signal.Signals(number).name)

    before: dict[signal.Signals, Any] = {number: signal.signal(number, handle) for number in asking()}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None stands for a handler that was not installed from Python and cannot be put back from it.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
