"""The script ``gpt-simple``: runs a command and sets the exit code."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from gpt_simple._names import PROGRAM, __version__
from gpt_simple.cli.terminal import echo, write_any_character
from gpt_simple.errors import ConfigError, DeviceLost, ExitCode, GptSimpleError

BEGAN = time.monotonic()
"""When the program began. Its later imports take seconds, which count as time of the run."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code of errors.ExitCode."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:  # without the imports of all that follows
        print(f"{PROGRAM} {__version__}")
        sys.exit(ExitCode.COMPLETED)
    write_any_character()
    from gpt_simple.hardware import check_system

    try:
        check_system()
    except ConfigError as error:
        _print(f"error: {error}\n")
        sys.exit(error.exit_code)
    from gpt_simple.launch.signals import STOPPING

    handlers = {number: signal.getsignal(number) for number in STOPPING}
    is_program = arguments is None
    if is_program:
        _prefer_expandable_segments()
    code = _run(given, is_program)
    if threading.current_thread() is threading.main_thread():
        # The command is done: a signal that comes while the interpreter shuts down must not change the exit code.
        for number, before in handlers.items():
            signal.signal(number, signal.SIG_IGN if is_program else before or signal.SIG_DFL)
    if is_program and "torch" not in sys.modules:
        # All that a command without computation has imported lives until now, and the interpreter would search
        # through it for garbage once more, which is a tenth of the command's time.
        gc.freeze()
    sys.exit(code)


def _prefer_expandable_segments() -> None:
    """Have torch's CUDA allocator waste less memory between tensors, unless the user has set it up.

    torch reads the variable while it is imported, in this process and in those that it starts.
    """
    if not any(f"PYTORCH_{device}ALLOC_CONF" in os.environ for device in ("", "CUDA_", "HIP_")):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _run(arguments: list[str], is_program: bool = False) -> int:
    import click

    from gpt_simple.cli.commands import program
    from gpt_simple.machine_failures import explained_machine_failures

    try:
        with explained_machine_failures():
            outcome = program.main(arguments, prog_name=PROGRAM, standalone_mode=False)
    except GptSimpleError as error:
        if not error.silent:
            _print(f"error: {error}\n")
        if isinstance(error, DeviceLost) and is_program:
            from gpt_simple.launch.member import leave

            leave(error.exit_code)  # now: the error holds the frames, and these the tensors
        return int(error.exit_code)
    except click.ClickException as error:
        if isinstance(error, click.NoSuchOption):
            from gpt_simple.cli.options import as_typed

            error = as_typed(error, arguments)
        context = error.ctx if isinstance(error, click.UsageError) else None
        usage = f"{context.get_usage()}\nTry '{context.command_path} --help' for help.\n\n" if context else ""
        _print(f"{usage}error: {error.format_message()}\n")
        return int(ExitCode.CONFIG)
    except (KeyboardInterrupt, click.Abort) as error:
        if isinstance(error.__cause__, EOFError):
            raise error.__cause__ from None  # click takes every EOFError for the end of a person's answers
        return int(ExitCode.FORCED)
    return int(outcome) if isinstance(outcome, int) else int(ExitCode.COMPLETED)


def _print(message: str) -> None:
    from gpt_simple.config.mistakes import printable

    with suppress(OSError):  # the terminal is gone, and the exit code is enough
        echo(printable(message), err=True, nl=False)
