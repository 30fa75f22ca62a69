"""Plugins that need or use other plugins: the order, what is missing, and the instance that they get."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt_simple import Plugin, hookimpl
from gpt_simple.errors import ExitCode, GptSimpleError, PluginError
from gpt_simple.hooks import HOOKS, Finding
from gpt_simple.plugin_host.activation import Switches
from gpt_simple.plugin_host.host import PluginHost
from gpt_simple.testing import check_contract, misbehaving, train, train_on_ranks
from tests.cli.test_plugins import cli, statuses
from tests.conftest import Shell
from tests.packages import FakePackage

AVERAGE = """
from gpt_simple import Plugin, hookimpl

class Average(Plugin):
    value = 1.5
"""
USER = """
from gpt_simple import Plugin, hookimpl

class User(Plugin):
    requires = ("average",)
    on_error = "abort"

    @hookimpl
    def on_run_start(self, run, event):
        run.log.info(f"the average is {run.plugin('average').value}", name="average")
"""


@pytest.fixture
def packages(fake_package: FakePackage) -> FakePackage:
    fake_package("acme-average", plugins={"average": "acme_average:Average"}, modules={"acme_average": AVERAGE})
    fake_package("acme-user", plugins={"user": "acme_user:User"}, modules={"acme_user": USER})
    return fake_package


def make(name: str, **declared: Any) -> type[Plugin[Any]]:
    return type(name, (Plugin,), declared)


def names(*plugins: Any) -> list[str]:
    host = PluginHost.activate({}, set_keys=lambda key: False, extra=plugins)
    own = [plugin.__name__.lower() for plugin in plugins]
    return [plugin.name for plugin in host.plugins if plugin.name in own]


def test_what_a_plugin_requires_or_uses_is_called_before_it() -> None:
    assert names(make("A", requires=("c",)), make("B", uses=("a", "nowhere")), make("C")) == ["c", "a", "b"]
    assert names(make("A", uses=("c",)), make("B"), make("C", before=("b",))) == ["c", "a", "b"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"requires": ("two",)}, {"requires": ("one",)}),
        ({"requires": ("two",)}, {"uses": ("one",)}),
        ({"uses": ("two",)}, {"after": ("one",)}),
        ({"before": ("two",)}, {"before": ("one",)}),
        ({"uses": ("one",)}, {}),
    ],
)
def test_a_cycle_of_any_kind_is_named(first: dict[str, Any], second: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match=r"requires and uses of these plugins contradict each other: one"):
        names(make("One", **first), make("Two", **second))


TABLES = "[plugins.user]\n"


@pytest.mark.parametrize(
    ("table", "options", "why"),
    [
        (TABLES, (), "is not active (not asked for); add [plugins.average], or add -p average; or switch 'user' off"),
        (
            TABLES + '[plugins]\ndisable = ["average"]\n',
            (),
            "is not active (plugins.disable); take it out of that list, or add -p average; or switch 'user' off",
        ),
        (
            TABLES + "[plugins.average]\n",
            ("-p", "no:average"),
            "is not active (-p no:average); leave out -p no:average; or switch 'user' off",
        ),
        (
            TABLES + "[plugins.average]\n",
            ("--no-plugins", "-p", "user"),
            "is not active (--no-plugins); leave that out, or add -p average; or switch 'user' off",
        ),
    ],
)
def test_a_required_plugin_that_is_off_is_one_error(
    packages: FakePackage, shell: Shell, here: Path, table: str, options: tuple[str, ...], why: str
) -> None:
    with (here / "config.toml").open("a") as file:
        file.write(table)
    line = (here / "config.toml").read_text().splitlines().index("[plugins.user]") + 1
    for command in ("run", "validate"):
        ended = shell(command, "config.toml", *options)
        said = " ".join((ended.err + ended.out).split())
        assert ended.code == ExitCode.PLUGIN
        assert f"config.toml:{line}{': plugins.user:' if command == 'run' else ' (plugins.user)'}" in said
        assert "plugin user (acme-user 1.0, " in said
        assert f"requires plugin 'average', which {why}" in said.replace(" ;", ";")
        assert said.count("requires plugin") == 1
    assert not (here / "out").exists()


def test_the_list_of_a_run_names_what_is_missing(packages: FakePackage, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(TABLES)
    assert statuses("--config", str(config))["user", "acme-user"] == "broken"
    output = cli("list", "--config", str(config)).output
    assert "requires plugin 'average', which is not active (not asked for); add [plugins.average]" in output
    config.write_text(TABLES + "[plugins.average]\n")
    rows = json.loads(cli("list", "--json", "--config", str(config)).output)["plugins"]
    order = {row["name"]: row["order"] for row in rows}
    assert order["average"] < order["user"]


def test_show_has_what_a_plugin_needs(packages: FakePackage, tmp_path: Path) -> None:
    assert "  requires  average\n" in cli("show", "user").output
    assert "missing" not in cli("show", "user").output
    file = tmp_path / "lonely.py"
    file.write_text(
        "from gpt_simple import Plugin\nclass P(Plugin):\n    requires = ('gone',)\n    uses = ('metrics',)\n"
    )
    shown = cli("show", str(file)).output
    assert "  requires  gone\n  uses      metrics\n  missing   gone (not installed)\n" in shown


@pytest.mark.parametrize(
    ("required", "hint"),
    [
        ("averag", "did you mean 'average'? (`gpt-simple plugins list` shows what is installed)"),
        ("gone", "install its package and switch it on: [plugins.gone] or -p gone (`gpt-simple plugins list`"),
    ],
)
def test_a_required_plugin_that_is_not_installed(packages: FakePackage, required: str, hint: str) -> None:
    with pytest.raises(PluginError) as caught:
        names(make("Needs", requires=(required, "metrics")))
    (problem,) = caught.value.problems
    assert f"requires plugin '{required}', which is not installed" in problem.message
    assert problem.hint.startswith(hint)


def test_all_that_is_missing_is_reported_at_once() -> None:
    with pytest.raises(PluginError) as caught:
        names(make("One", requires=("gone", "lost")), make("Two", requires=("gone",)), make("Three", requires=("one",)))
    assert [problem.message.split("which")[0].split("(")[0] for problem in caught.value.problems] == [
        "plugin one "
    ] * 2 + ["plugin two "], "a plugin that requires a broken one is not to blame"


def test_a_built_in_plugin_can_be_required() -> None:
    needs = make("Needs", requires=("evaluate",))
    off = Switches.parse(["no:evaluate"])
    with pytest.raises(PluginError, match=r"requires plugin 'evaluate', which is not active \(-p no:evaluate\)"):
        PluginHost.activate({}, set_keys=lambda key: False, switches=off, extra=[needs])
    assert train(needs).failed == []


def test_a_plugin_that_is_off_requires_nothing(packages: FakePackage) -> None:
    table = {"user": {}, "disable": ["user"]}
    host = PluginHost.activate(table, set_keys=lambda key: False)
    assert "user" not in [plugin.name for plugin in host.plugins]


class Average(Plugin[Any]):
    value = 2.5


def test_every_hook_of_a_run_gets_the_other_plugin() -> None:
    seen: list[str] = []

    def implementation(hook: str) -> Callable[..., Any]:
        def act(self: Any, run: Any) -> Any:
            assert run.plugin("average").value == 2.5
            assert run.plugin("nowhere", None) is None
            seen.append(hook)
            return {"metrics": {}, "findings": []}.get(HOOKS[hook].returns)

        return act

    of_run = [name for name, info in HOOKS.items() if "run" in info.arguments]
    members = {name: hookimpl(implementation(name)) for name in of_run}
    train(make("Needs", requires=("average",), on_error="abort", **members), Average)
    assert {*of_run} - {*seen} == {"on_checkpoint_loaded", "on_run_error"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", r"run.plugin: plugin 'nowhere' is not installed; install its package"),
        ("evaluat", r"run.plugin: plugin 'evaluat' is not installed; did you mean 'evaluate'"),
        ("memory", r"run.plugin: plugin 'memory' is not active \(not asked for\); add \[plugins.memory\]"),
    ],
)
def test_a_plugin_that_is_not_there_is_named(name: str, message: str) -> None:
    def asks(self: Any, run: Any) -> None:
        run.plugin(name)

    with pytest.raises(PluginError, match=message):
        train(make("Asks", on_run_start=hookimpl(asks), on_error="abort"))


def test_a_plugin_that_was_switched_off_is_no_longer_there() -> None:
    found: list[Any] = []

    def look(self: Any, run: Any) -> None:
        found.append(type(run.plugin("misbehaving", None)).__name__)
        if run.step == 2:
            run.plugin("misbehaving")

    watches = make("Watches", uses=("misbehaving",), on_step_end=hookimpl(look))
    trained = train(misbehaving("on_metrics", "raises"), watches)
    assert found == ["Misbehaving", "NoneType"]
    assert sorted(trained.failed) == ["misbehaving", "watches"]
    messages = [event.message for event in trained.recorder.events("on_log") if event.name == "plugin_failed"]
    assert "run.plugin: plugin 'misbehaving' was switched off, because it failed" in messages[-1]


def test_on_other_processes_only_their_plugins_are_there() -> None:
    class OnMain(Plugin[Any]):
        pass

    class OnAll(Plugin[Any]):
        ranks = "all"

    class Needs(Plugin[Any]):
        ranks, requires, on_error = "all", ("onmain", "onall"), "abort"

        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            assert type(run.plugin("onall")) is OnAll
            assert (run.plugin("onmain", None) is None) != run.is_main
            if event.step == 2:
                run.plugin("onmain")

    main, other = train_on_ranks(OnMain, OnAll, Needs)
    assert "run.plugin: plugin 'onmain' runs on the main process only; ask where run.is_main is true" in other.error
    assert main.error != ""


class NeedsAverage(Plugin[Any]):
    requires, on_error = ("average",), "abort"

    @hookimpl
    def check_config(self, config: Any) -> list[Finding]:
        return []

    @hookimpl
    def on_step_end(self, run: Any, event: Any) -> None:
        assert run.plugin("average").value == 2.5


def test_the_contract_suite_runs_a_plugin_beside_others(packages: FakePackage) -> None:
    check_contract(NeedsAverage, beside=[Average])
    for plugin in (make("Lost", requires=("gone",)), make("Lost", requires=("user", "gone"))):
        with pytest.raises(AssertionError, match="requires plugin 'gone', which is not installed"):
            check_contract(plugin)
    check_contract(make("Indirect", requires=("user",)))


def test_plugins_check_switches_on_what_a_plugin_requires(packages: FakePackage, here: Path) -> None:
    assert "user: ok (lint and tiny runs)" in cli("check", "user").output


def test_a_missing_plugin_is_an_error_in_python_too() -> None:
    with pytest.raises(GptSimpleError) as caught:
        train(NeedsAverage)
    assert caught.value.exit_code == ExitCode.PLUGIN
