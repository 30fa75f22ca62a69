"""``gpt-simple plugins`` as a user meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomli
from click.testing import CliRunner, Result

from gpt_simple.cli.fields import builtin_configs
from gpt_simple.cli.plugins import plugins
from gpt_simple.config.render import toml_text
from gpt_simple.errors import ConfigError, PluginError
from gpt_simple.spec import resolve_spec
from tests.packages import PLUGIN, FakePackage
from tests.plugin_host.test_host import install_broken


def cli(*arguments: str) -> Result:
    result = CliRunner().invoke(plugins, list(arguments), standalone_mode=False)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def statuses(*arguments: str) -> dict[tuple[str, str], str]:
    document = json.loads(cli("list", "--json", *arguments).output)
    assert document["schema"] == 1
    return {(row["name"], row["package"]): row["status"] for row in document["plugins"]}


def in_a_new_process(*arguments: str, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\nfrom gpt_simple.cli.main import _run\ncode = _run(sys.argv[1:])\n"
        "print(*(name for name in ('torch', 'rich', 'accelerate') if name in sys.modules), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(site) if site else ""}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_list_and_help_work_beside_any_package_and_import_none(fake_package: FakePackage) -> None:
    install_broken(fake_package)
    site = fake_package("b-command", commands={"broken": "nowhere:main"})
    for arguments in (["plugins", "list"], ["--help"], ["plugins", "list", "--hooks"]):
        done = in_a_new_process(*arguments, site=site)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "\n"
    assert "raises" in in_a_new_process("plugins", "list", site=site).stdout


def test_the_status_of_every_kind_of_plugin(fake_package: FakePackage) -> None:
    install_broken(fake_package)
    found = statuses()
    assert found["console", "gpt-simple-trainer"] == "default"
    assert found["console", "b-thief"] == "shadowed"
    assert found["old", "b-old"] == "incompatible"
    assert found["twice", "b-one"] == found["twice", "b-two"] == "broken"
    # Only an import can tell that this one is broken, and nothing is imported.
    assert found["raises", "b-import"] == "available"


def test_list_for_a_configuration_has_reasons_and_call_order(fake_package: FakePackage, tmp_path: Path) -> None:
    install_broken(fake_package)
    source = PLUGIN.format(cls="Acme") + "    after = ('metrics',)\n    before = ('console',)\n"
    fake_package("acme-log", plugins={"acme": "acme_log:Acme"}, modules={"acme_log": source})
    config = tmp_path / "config.toml"
    config.write_text("[plugins]\ndisable = ['sample']\n[plugins.acme]\n[plugins.raises]\n")
    found = statuses("--config", str(config), "-p", "no:evaluate")
    assert found["acme", "acme-log"] == "active"
    assert found["raises", "b-import"] == "broken"
    assert found["sample", "gpt-simple-trainer"] == found["evaluate", "gpt-simple-trainer"] == "disabled"
    assert found["console", "b-thief"] == "shadowed"
    assert found["old", "b-old"] == "incompatible"
    assert found["twice", "b-one"] == found["twice", "b-two"] == "broken"
    assert found.keys() == statuses().keys()
    found = statuses("--config", str(config), "-p", "twice", "-p", "no:old")
    assert (found["twice", "b-one"], found["twice", "b-two"], found["old", "b-old"]) == (
        "broken",
        "broken",
        "incompatible",
    )
    rows = json.loads(cli("list", "--json", "--config", str(config)).output)["plugins"]
    active = [row for row in rows if row["order"]]
    assert [row["order"] for row in active] == list(range(1, len(active) + 1))
    order = [row["name"] for row in active]
    assert order.index("metrics") < order.index("acme") < order.index("console")
    assert {row["why"] for row in active} == {"default", "[plugins.acme]"}
    (broken,) = (row for row in rows if row["name"] == "raises")
    assert "ValueError: boom" in broken["why"]


def test_many_mistakes_of_one_plugin_leave_the_table_readable(fake_package: FakePackage, tmp_path: Path) -> None:
    source = "from gpt_simple import Plugin\nclass P(Plugin):\n    ranks = 1\n    before = 2\n    after = 3\n"
    fake_package("acme-log", plugins={"acme": "acme_log:P"}, modules={"acme_log": source})
    config = tmp_path / "config.toml"
    config.write_text("[plugins.acme]\n")
    table, _, below = cli("list", "--config", str(config)).output.partition("\n\n")
    assert max(map(len, table.splitlines())) < 250
    assert [line.partition(": plugin acme (")[0] for line in below.splitlines()] == ["acme"] * 3


def test_show_says_how_a_file_is_switched_on(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.format(cls="Mine"))
    assert f"  active    with -p {file}\n" in cli("show", str(file)).output


def test_list_names_a_table_that_no_plugin_has(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("\n[plugins.consle]\n")
    with pytest.raises(ConfigError, match=r"config.toml:2.*'consle'.*did you mean 'console'"):
        cli("list", "--config", str(config))


def test_list_external(fake_package: FakePackage) -> None:
    assert cli("list", "--external").output == "no plugins\n"
    fake_package("acme-log", plugins={"acme": "acme_log:Acme"}, summary="Logs [for] Acme.")
    (line,) = cli("list", "--external").output.splitlines()[1:]
    assert line.split()[:5] == ["acme", "available", "1.0", "acme-log", "external"]
    assert line.endswith("[plugins.acme]  Logs [for] Acme.")


def test_list_hooks_shows_the_catalogue_and_who_listens(tmp_path: Path) -> None:
    assert re.search(r"^collect_metrics +all +metrics ", cli("list", "--hooks").output, re.MULTILINE)
    config = tmp_path / "config.toml"
    config.write_text("")
    rows = json.loads(cli("list", "--hooks", "--json", "--config", str(config)).output)["hooks"]
    by_name = {row["name"]: row["plugins"] for row in rows}
    assert by_name["collect_metrics"] == ["throughput"]
    assert by_name["on_gradients"] == []


DETAILED = '''
"""A module."""
from collections.abc import Mapping
from typing import Annotated, Literal
from annotated_types import Ge
from attrs import frozen
from typing_extensions import Doc
from gpt_simple import Plugin, hookimpl

@frozen
class Config:
    path: Annotated[str, Doc("where to write")] = 'a "b".csv'
    every: Annotated[int, Ge(1), Doc("steps between rows")] = 10
    mode: Literal["a", "w"] = "a"
    limit: float | None = None
    names: tuple[str, ...] = ("x", "y")
    weights: Mapping[str, float] = {"a b": 1.5}

class Acme(Plugin[Config]):
    """Writes things."""
    Config = Config
    state_required = True

    @classmethod
    @hookimpl
    def register_components(cls, registry):
        registry.add("schedule", "zigzag", "acme_log:zigzag")

    @hookimpl
    def on_step_end(self, run, event):
        pass
'''


def test_show_can_be_pasted(fake_package: FakePackage) -> None:
    fake_package("acme-log", plugins={"acme": "acme_log:Acme"}, modules={"acme_log": DETAILED}, summary="For Acme.")
    text = cli("show", "acme").output
    for part in (
        "acme: For Acme.",
        "acme-log 1.0",
        "on_step_end            main process",
        'chosen by optimizer.schedule = "zigzag"',
        "# where to write",
        "an integer >= 1",
        "a checkpoint made with it needs it",
    ):
        assert part in text
    pasted = tomli.loads(text[text.rindex("[plugins.acme]") :])["plugins"]["acme"]
    assert pasted == {"path": 'a "b".csv', "every": 10, "mode": "a", "names": ["x", "y"], "weights": {"a b": 1.5}}


def test_show_of_a_name_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="did you mean 'console'"):
        cli("show", "consle")


@pytest.mark.parametrize("value", [True, 3, 1e-8, 'q"\\', ["a", 1.5], {"a b": {"c": [1]}}, float("inf")])
def test_values_are_written_as_toml(value: object) -> None:
    assert tomli.loads(f"x = {toml_text(value)}")["x"] == value


def test_check_lints_and_runs(fake_package: FakePackage, tmp_path: Path) -> None:
    fake_package("acme-log", plugins={"acme": "acme_log:Acme"}, modules={"acme_log": PLUGIN.format(cls="Acme")})
    good = cli("check", "acme")
    assert (good.return_value, good.output) == (0, "acme: ok (lint and tiny runs)\n")
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.format(cls="Mine").replace("pass", "raise ValueError('boom')"))
    bad = cli("check", str(file))
    assert bad.return_value == 5
    assert "ValueError: boom" in bad.output
    assert cli("check", str(file), "--lint-only").return_value == 0


COMPONENT = """
from attrs import frozen
from gpt_simple import Plugin, hookimpl

@frozen
class Own:
    name: str = "mine"
    schedule: str = "cosine"
    max_grad_norm: float = 1.0

class Parts(Plugin):
    @classmethod
    @hookimpl
    def register_components(cls, registry):
        registry.add({arguments})
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("'source', 'mine', 'nowhere:build', config=Own", "Own has no field source, tokenizer"),
        ("'optimizer', 'mine', 'nowhere:build', config=Own", "Own has no field learning_rate, warmup_steps"),
        ("'schedule', 'mine', 'nowhere:build'", "could not be imported: ModuleNotFoundError"),
    ],
)
def test_check_sees_components_that_cannot_serve(tmp_path: Path, arguments: str, message: str) -> None:
    file = tmp_path / "parts.py"
    file.write_text(COMPONENT.format(arguments=arguments))
    broken = cli("check", str(file))
    assert broken.return_value == 5
    assert f"'mine' of the plugin parts ({file})" in broken.output
    assert message in broken.output


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        ("RuntimeError('no part today')", 5, "a run fails: schedule 'mine' of the plugin parts"),
        ("ConfigError('it needs a file')", 0, "schedule 'mine' was not tried: it needs a file"),
    ],
)
def test_check_builds_and_trains_components(tmp_path: Path, error: str, code: int, line: str) -> None:
    file = tmp_path / "parts.py"
    build = f"\ndef build(*_):\n    raise {error}\nfrom gpt_simple import ConfigError\n"
    file.write_text(COMPONENT.format(arguments="'schedule', 'mine', build") + build)
    result = cli("check", str(file))
    assert (result.return_value, line in result.output) == (code, True), result.output


def test_check_without_a_name_is_for_plugins_of_other_packages(fake_package: FakePackage) -> None:
    assert "no plugin of another package" in cli("check").output
    install_broken(fake_package)
    fake_package("acme-log", plugins={"acme": "acme_log:Acme"}, modules={"acme_log": PLUGIN.format(cls="Acme")})
    result = cli("check", "--lint-only")
    assert result.return_value == 5
    assert "acme: ok (lint)" in result.output
    assert "raises: broken" in result.output


def test_a_command_of_another_package_is_a_command(fake_package: FakePackage) -> None:
    source = "import click\n@click.command()\ndef main():\n    click.echo('hello from acme')\n"
    site = fake_package(
        "acme-log", commands={"acme": "acme_cli:main"}, modules={"acme_cli": source}, summary="Does things."
    )
    assert re.search(r"acme +Does things\.", in_a_new_process("--help", site=site).stdout)
    assert in_a_new_process("acme", site=site).stdout == "hello from acme\n"


def test_a_command_that_is_broken_breaks_only_itself(fake_package: FakePackage) -> None:
    source = "print('printed by the import')\nimport click\n@click.command()\ndef main():\n    click.echo('hello')\n"
    commands = {"exits": "b_exit:main", "nothing": "b_nothing:main", "value": "b_value:no", "loud": "b_loud:main"}
    modules = {"b_exit": "raise SystemExit(3)", "b_value": "no = 1", "b_loud": source}
    site = fake_package("b-commands", commands=commands, modules=modules)
    for name, message in {
        "exits": "command exits (b-commands 1.0): importing b_exit failed: SystemExit: 3",
        "nothing": "command nothing (b-commands 1.0): importing b_nothing failed: ModuleNotFoundError",
        "value": "command value (b-commands 1.0): b_value:no is no click command",
    }.items():
        done = in_a_new_process(name, site=site)
        assert (done.returncode, done.stdout) == (PluginError.exit_code, "")
        assert done.stderr.startswith(f"error: {message}")
    loud = in_a_new_process("loud", site=site)
    assert (loud.stdout, loud.returncode) == ("hello\n", 0)
    assert loud.stderr.startswith("printed by the import\n")


def test_a_run_that_uses_a_broken_plugin_stops_with_one_sentence(fake_package: FakePackage) -> None:
    install_broken(fake_package)
    site = Path(sys.path[0])
    done = in_a_new_process("run", "--data.source", "stories", "-p", "raises", site=site)
    assert done.returncode == PluginError.exit_code
    assert "raises (b-import 1.0): importing b_import failed: ValueError: boom" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_part_of_a_plugin_that_is_installed_but_off(fake_package: FakePackage) -> None:
    fake_package("acme-log", plugins={"acme": "acme_log:Acme"}, modules={"acme_log": PLUGIN.format(cls="Acme")})
    with pytest.raises(ConfigError, match=r"switch that on: \[plugins\.NAME\] or -p NAME \(.*acme.*\)"):
        resolve_spec(None, overrides=[("optimizer.schedule", "zigzag")])


def test_the_reference_has_built_in_plugins_alone(fake_package: FakePackage) -> None:
    before = set(builtin_configs())
    fake_package("acme-log", plugins={"acme": "acme_log:Acme"}, modules={"acme_log": DETAILED})
    assert set(builtin_configs()) == before
    assert {"console", "wandb"} <= before
