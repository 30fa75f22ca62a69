"""The options of all commands: their spellings, their numbers, and how a mistake in them is reported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from gpt_simple.cli.commands import program
from gpt_simple.cli.options import spelling
from gpt_simple.plugin_host.discovery import own_commands
from tests.conftest import Shell


def of_group(path: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Option]]:
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from of_group((*path, name), inner)
    yield from ((path, option) for option in command.params if isinstance(option, click.Option))


def all_options() -> list[tuple[tuple[str, ...], click.Option]]:
    context = click.Context(program)
    commands = {name: program.get_command(context, name) for name in own_commands()}
    return [found for name, command in commands.items() if command for found in of_group((name,), command)]


OPTIONS = all_options()
WORDS = [(path, name, option.is_flag) for path, option in OPTIONS for name in option.opts if "_" in spelling(name[2:])]
RANGES = [(path, option.opts[0]) for path, option in OPTIONS if isinstance(option.type, click.FloatRange)]


def test_the_options_of_all_commands_are_found() -> None:
    assert {path[0] for path, _ in OPTIONS} == set(own_commands())
    assert {"--input_dir", "--no-plugins", "--top-k", "--world-size"} <= {name for _, name, _ in WORDS}
    assert {"--mfu", "--temperature", "--top-p", "--val_fraction"} == {name for _, name in RANGES}


@pytest.mark.parametrize(("path", "name", "is_flag"), WORDS)
@pytest.mark.parametrize("separator", ["-", "_"])
def test_dashes_and_underscores_are_one(
    shell: Shell, path: tuple[str, ...], name: str, is_flag: bool, separator: str
) -> None:
    typed = "--" + spelling(name[2:]).replace("_", separator)
    ended = shell(*path, typed, *([] if is_flag else ["1"]), "--help")
    assert ended.code == 0, ended.err
    assert name in ended.out


@pytest.mark.parametrize(("path", "name"), RANGES)
def test_no_range_of_numbers_has_nan(shell: Shell, path: tuple[str, ...], name: str) -> None:
    needed = {"sample": ["out"], "tokenize": ["--input_dir=in", "--output_dir=out"], "validate": ["config.toml"]}
    ended = shell(*path, *needed[path[0]], name, "nan")
    assert ended.code == 2
    assert f"error: Invalid value for '{name}': expected a number, got NaN" in ended.err


MISTAKES = {
    ("run", "--max-step", "3"): "there is no option --max-step; did you mean --training.max_steps?",
    ("run", "--training.max-steps"): "write --training.max-steps VALUE",
    ("run", "--training.max-step=3"): "did you mean training.max_steps?",
    ("tokenize", "--input-dirs", "in"): "No such option '--input-dirs'. (Did you mean one of: '--input_dir'",
    ("plugins", "list", "--no_plugin"): "No such option '--no_plugin'. Did you mean '--no_plugins'?",
    ("report",): "Missing argument 'RUN...'.",
    ("init", "--preset", "huge"): "'huge' is not one of",
    ("rum",): "There is no command 'rum'",
    ("status", "nowhere"): "there is no run in nowhere",
    ("sample", "out", "--device", "\x1b]0;title\x07"): r"--device \x1b",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_an_error_with_what_was_typed(shell: Shell, arguments: tuple[str, ...]) -> None:
    ended = shell(*arguments)
    assert ended.code in (2, 4)
    (line,) = [line for line in ended.err.splitlines() if "error:" in line.lower()]
    assert line.startswith("error: ")
    assert MISTAKES[arguments] in line


def test_fields_are_options_with_dashes_too(shell: Shell, here: Path) -> None:
    (here / "csvlog.py").write_text(
        "from collections.abc import Mapping\nfrom attrs import frozen\nfrom gpt_simple import Plugin\n"
        "@frozen\nclass Config:\n    sent_by: Mapping[str, str] = {}\n"
        "class CsvLog(Plugin[Config]):\n    Config = Config\n"
    )
    fields = ["--training.max-steps=7", "--plugins.csvlog.sent-by.x-name", "a-b"]
    ended = shell("config", "show", "config.toml", "-p", "./csvlog.py", "--origin", *fields)
    assert ended.code == 0, ended.err
    assert re.search(r"max_steps = 7 +# --training.max_steps, overrides config.toml", ended.out)
    assert re.search(r'x-name"? = "a-b"', ended.out), ended.out
