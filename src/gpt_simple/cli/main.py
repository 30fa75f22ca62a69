"""The script ``gpt-simple``: runs a command and sets the exit code."""

from __future__ import annotations

import gc
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from gpt_simple._names import PROGRAM, __version__
from gpt_simple.errors import ExitCode, GptSimpleError

BEGAN = time.monotonic()
"""When the program began. Its later imports take seconds, which count as time of the run."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code of errors.ExitCode."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:  # without the imports of all that follows
        print(f"{PROGRAM} {__version__}")
        sys.exit(ExitCode.COMPLETED)
    code = _run(given)
    if arguments is None:
        from gpt_simple.launch.signals import STOPPING

        # The command is done: a signal that comes while the interpreter shuts down must not change the exit code.
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        if "torch" not in sys.modules:
            # All that a command without computation has imported lives until now, and the interpreter would search
            # through it for garbage once more, which is a tenth of the command's time.
            gc.freeze()
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    import click

    from gpt_simple.cli.commands import program

    try:
        outcome = program.main(arguments, prog_name=PROGRAM, standalone_mode=False)
    except GptSimpleError as error:
        if not error.silent:
            from gpt_simple.config.mistakes import printable

            with suppress(OSError):  # the terminal is gone, and the exit code is enough
                sys.stderr.write(printable(f"error: {error}\n"))  # one write: other processes write there too
        return int(error.exit_code)
    except click.ClickException as error:
        error.show()
        return int(ExitCode.CONFIG)
    except (KeyboardInterrupt, click.Abort) as error:
        if isinstance(error.__cause__, EOFError):
            raise error.__cause__ from None  # click takes every EOFError for the end of a person's answers
        return int(ExitCode.FORCED)
    return int(outcome) if isinstance(outcome, int) else int(ExitCode.COMPLETED)
