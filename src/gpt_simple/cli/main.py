"""The script ``gpt-simple``: finds commands by their entry points and owns the exit codes.

``--help`` lists the commands from package metadata; only the one that is invoked is imported. So another package's
command is a command like any other, and a broken one breaks nothing but itself.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from gpt_simple._names import PROGRAM, __version__
from gpt_simple.errors import ExitCode, GptSimpleError, PluginError

BEGAN = time.monotonic()
"""When the program began: what it imports later takes seconds."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code of errors.ExitCode."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        print(f"{PROGRAM} {__version__}")
        sys.exit(ExitCode.COMPLETED)
    code = _run(given)
    if arguments is None:
        _ignore_signals()
        if "torch" not in sys.modules:
            # A command that only looked: all that it imported lives until now, and the interpreter would search through
            # it for garbage once more, which is a tenth of the command's time.
            gc.freeze()
    sys.exit(code)


def _ignore_signals() -> None:
    """Everything is done and told: a signal that comes while the interpreter tidies up must not change how it ended."""
    from gpt_simple.launch.signals import STOPPING

    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def _run(arguments: list[str]) -> int:
    import click

    try:
        outcome = _group().main(arguments, prog_name=PROGRAM, standalone_mode=False)
    except GptSimpleError as error:
        if not error.silent:
            from gpt_simple.config.mistakes import printable

            with suppress(OSError):  # the terminal is gone: the exit code is all that is left to say
                sys.stderr.write(printable(f"error: {error}\n"))  # in one piece: other processes may write there too
        return int(error.exit_code)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        error.show()
        return int(ExitCode.CONFIG)
    except (KeyboardInterrupt, click.Abort):
        return int(ExitCode.FORCED)
    except BrokenPipeError:
        # Whoever read our output has left, for instance `| head`; Python would complain again while flushing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.FAILURE)
    return int(outcome) if isinstance(outcome, int) else int(ExitCode.COMPLETED)


def _group() -> Any:
    """The click group; made in a function so that ``--version`` need not import click."""
    import click

    from gpt_simple.plugin_host.discovery import PluginRecord, commands, own_commands, summary, usable

    own = own_commands()

    @cache
    def found() -> dict[str, PluginRecord]:
        return usable(commands())  # once: it reads the metadata of everything that is installed

    class Commands(click.Group):
        """Commands by name from package metadata."""

        def list_commands(self, context: click.Context) -> list[str]:
            return sorted(found())

        def get_command(self, context: click.Context, name: str) -> click.Command | None:
            record = own.get(name) or found().get(name)
            if record is None or record.entry_point is None:
                return None
            if record.origin == "builtin":
                command: click.Command = record.entry_point.load()
                return command
            from gpt_simple.plugin_host.loading import load_record

            foreign = load_record(record, "command")
            if not isinstance(foreign, click.Command):
                raise PluginError(f"command {record.label}: {record.value} is no click command")
            return foreign

        def resolve_command(
            self, context: click.Context, args: list[str]
        ) -> tuple[str | None, click.Command | None, list[str]]:
            from difflib import get_close_matches

            name = args[0]
            if self.get_command(context, name) is None and not name.startswith("-"):
                names = self.list_commands(context)
                close = get_close_matches(name, names, 1)
                meant = f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(names)}"
                raise click.UsageError(f"there is no command {name!r}{meant}", context)
            return super().resolve_command(context, args)

        def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
            with formatter.section("Commands"):
                formatter.write_dl([(name, summary(record)) for name, record in sorted(found().items())])

    return Commands(
        name=PROGRAM,
        help="Pretrain GPT-style language models: a small engine, everything else a plugin.",
        params=[click.Option(["--version"], is_flag=True, help="Print the version.", expose_value=False)],
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        no_args_is_help=True,
    )
