"""From the ``[plugins]`` table to plugins that run: an installed plugin breaks nothing, a failure names its plugin."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from gpt_simple import Config, Finding, Plugin, PluginsConfig, hookimpl
from gpt_simple.errors import ConfigError, GptSimpleError, PluginError
from gpt_simple.hooks import Component, Registry
from gpt_simple.plugin_host.activation import Switches
from gpt_simple.plugin_host.host import PluginHost
from gpt_simple.plugin_host.loading import load_plugin
from tests.packages import PLUGIN, FakePackage

Activate = Callable[..., PluginHost]


def use(*switches: str, **table: object) -> PluginHost:
    return PluginHost.activate(table, set_keys=lambda key: False, switches=Switches.parse(switches))


def install_broken(fake_package: FakePackage) -> dict[str, str]:
    """One package per way to be broken; name -> what the error must say."""
    good = PLUGIN.format(cls="Plug")
    fake_package("b-import", plugins={"raises": "b_import:Plug"}, modules={"b_import": "raise ValueError('boom')"})
    fake_package("b-exit", plugins={"exits": "b_exit:Plug"}, modules={"b_exit": "raise SystemExit(3)"})
    skips = "class Skipped(BaseException): pass\nraise Skipped('not here')"
    fake_package("b-skips", plugins={"skips": "b_skips:Plug"}, modules={"b_skips": skips})
    fake_package("b-target", plugins={"target": "b_target"}, modules={"b_target": good})
    endless = (
        "from attrs import frozen\nfrom gpt_simple import Plugin\n@frozen\nclass Node:\n"
        "    children: tuple['Node', ...] = ()\nclass P(Plugin):\n    Config = Node\n"
    )
    fake_package("b-endless", plugins={"endless": "b_endless:P"}, modules={"b_endless": endless})
    fake_package("b-nomodule", plugins={"nomodule": "b_nomodule:Plug"})
    fake_package("b-noattr", plugins={"noattr": "b_noattr:Nothing"}, modules={"b_noattr": good})
    fake_package("b-old", plugins={"old": "b_old:Plug"}, modules={"b_old": good}, requires=["gpt-simple-trainer<0.0.1"])
    fake_package("b-one", plugins={"twice": "b_one:Plug"}, modules={"b_one": good})
    fake_package("b-two", plugins={"twice": "b_two:Plug"}, modules={"b_two": good})
    fake_package("b-lint", plugins={"lint": "b_lint:Plug"}, modules={"b_lint": good.replace("on_metrics", "on_metrcs")})
    fake_package(
        "b-instance", plugins={"instance": "b_instance:plug"}, modules={"b_instance": f"{good}\nplug = Plug(None)"}
    )
    fake_package("b-thief", plugins={"console": "b_thief:Plug"}, modules={"b_thief": "raise ValueError('imported')"})
    return {
        "raises": r"raises \(b-import 1.0\): importing b_import failed: ValueError: boom",
        "exits": r"exits \(b-exit 1.0\): importing b_exit failed: SystemExit: 3",
        "skips": r"skips \(b-skips 1.0\): importing b_skips failed: Skipped: not here",
        "target": r"target \(b-target 1.0\): its entry point is 'b_target'; expected MODULE:NAME",
        "endless": r"endless \(b-endless 1.0, .*\): Config.children is a Node inside a Node, which has no end",
        "nomodule": r"nomodule \(b-nomodule 1.0\): importing b_nomodule failed: ModuleNotFoundError",
        "noattr": r"noattr \(b-noattr 1.0\): module b_noattr has no 'Nothing'",
        "old": r"old \(b-old 1.0\) needs gpt-simple-trainer<0.0.1",
        "twice": r"'twice' is claimed by b-one 1.0 and b-two 1.0",
        "lint": r"lint \(b-lint 1.0, .*b_lint.py\): there is no hook on_metrcs",
        "instance": r"instance \(b-instance 1.0, .*\): .*not an instance",
    }


def test_broken_packages_break_only_the_run_that_uses_them(fake_package: FakePackage) -> None:
    expected = install_broken(fake_package)
    before = [plugin.name for plugin in use().plugins]
    assert before == sorted(before)
    assert "console" in before
    for name, message in expected.items():
        with pytest.raises(PluginError, match=message):
            use(name)


def test_all_broken_plugins_of_a_run_are_reported_at_once(fake_package: FakePackage) -> None:
    expected = install_broken(fake_package)
    with pytest.raises(PluginError) as caught:
        use(*expected)
    assert len(str(caught.value).splitlines()) == len(expected)


def test_what_an_import_prints_stays_off_stdout(fake_package: FakePackage, capsys: pytest.CaptureFixture[str]) -> None:
    fake_package("noisy", plugins={"noisy": "noisy:P"}, modules={"noisy": "print('hello')" + PLUGIN.format(cls="P")})
    assert use("noisy").plugins
    out, err = capsys.readouterr()
    assert (out, err) == ("", "hello\n")


def test_only_active_plugins_are_imported(fake_package: FakePackage, tmp_path: Path) -> None:
    source = f"open({str(tmp_path / 'imported')!r}, 'w')\n" + PLUGIN.format(cls="P")
    fake_package("acme-log", plugins={"acme": "acme_log:P"}, modules={"acme_log": source})
    use()
    for options in ((), ("no:acme",)):
        for table in ({"acme": {}}, {"acme": {}, "disable": ["acme"]}):
            switches = Switches.parse(options, no_plugins=True)
            host = PluginHost.activate(table, set_keys=lambda key: False, switches=switches)
            assert (host.notes, dict(host.inactive_configs)) == ((), {})
    assert not (tmp_path / "imported").exists()
    use(acme={})
    assert (tmp_path / "imported").exists()


def test_a_disabled_table_is_still_validated(fake_package: FakePackage) -> None:
    source = (
        "from attrs import frozen\nfrom gpt_simple import Plugin\n@frozen\nclass C:\n    size: int = 1\n"
        "class P(Plugin):\n    Config = C\n"
    )
    fake_package("acme-log", plugins={"acme": "acme_log:P"}, modules={"acme_log": source})
    host = use(acme={"size": 2}, disable=["acme"])
    assert "acme" not in [plugin.name for plugin in host.plugins]
    assert [a.name for a in host.config_classes()["acme"].__attrs_attrs__] == ["size"]


def test_a_disabled_broken_plugin_is_a_note(fake_package: FakePackage) -> None:
    install_broken(fake_package)
    host = use(raises={}, disable=["raises"])
    assert len(host.notes) == 1
    assert "[plugins.raises] is off and was not checked" in host.notes[0]


def test_the_error_of_each_active_plugin_is_kept(fake_package: FakePackage) -> None:
    expected = install_broken(fake_package)
    errors: list[GptSimpleError] = []
    switches = Switches.parse(["raises", "lint"])
    host = PluginHost.activate({}, set_keys=lambda key: False, switches=switches, errors=errors)
    assert errors == list(host.failures.values())
    assert host.failures.keys() == {"raises", "lint"}
    assert all(re.search(expected[name], str(error)) for name, error in host.failures.items())
    assert "console" in host.names


def test_a_plugin_from_a_file_is_named_after_it(tmp_path: Path, bare: Switches) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.format(cls="Whatever"))
    host = PluginHost.activate({"mine": {}}, set_keys=lambda key: False, switches=Switches((str(file),), bare.disable))
    assert [(plugin.name, plugin.file) for plugin in host.plugins] == [("mine", str(file))]
    assert host.decisions["mine"].why == "passed"


@pytest.mark.parametrize(
    ("file_name", "source", "error", "message"),
    [
        ("missing.py", None, ConfigError, "expected the path of a Python file"),
        ("Bad-Name.py", "", ConfigError, "rename the file"),
        ("raises.py", "1/0", PluginError, "running the file failed: ZeroDivisionError"),
        ("none.py", "from gpt_simple import Plugin", PluginError, "found none"),
        ("two.py", PLUGIN.format(cls="A") + PLUGIN.format(cls="B"), PluginError, "found A, B"),
        ("console.py", PLUGIN.format(cls="A"), PluginError, "'console' is the name of a built-in plugin"),
    ],
)
def test_bad_files(tmp_path: Path, file_name: str, source: str | None, error: type[Exception], message: str) -> None:
    if source is not None:
        (tmp_path / file_name).write_text(source)
    with pytest.raises(error, match=message):
        use(str(tmp_path / file_name))


@frozen
class SizeConfig:
    size: int = 1


class Sized(Plugin[SizeConfig]):
    Config = SizeConfig

    @hookimpl
    def check_config(self, config):
        return [Finding("info", "size", str(self.config.size)), Finding("info", "x", "y", place="model.n_head")]


def test_a_plugin_gets_its_own_configuration(activate: Activate) -> None:
    host = activate(Sized)
    assert host.config_classes() == {"sized": SizeConfig}
    host.instantiate(Config(plugins=PluginsConfig(tables={"sized": SizeConfig(size=5)})))
    assert [(f.message, f.place) for f in host.check_config(Config(), None)] == [
        ("5", "plugins.sized"),
        ("y", "model.n_head"),
    ]


def test_without_a_table_it_gets_the_defaults(activate: Activate) -> None:
    host = activate(Sized)
    host.instantiate(Config())
    assert host.plugins[0].instance.config == SizeConfig()


def test_an_instance_brings_its_configuration(activate: Activate) -> None:
    instance = Sized(SizeConfig(size=9))
    host = activate(instance)
    host.instantiate(Config())
    assert host.plugins[0].instance is instance
    assert host.config_classes() == {}
    with pytest.raises(ConfigError, match="passed as an instance"):
        activate(instance, sized={})


def test_passed_plugins_have_distinct_names_and_no_built_ins(activate: Activate) -> None:
    with pytest.raises(ConfigError, match="two plugins named 'sized'"):
        activate(Sized, Sized)
    with pytest.raises(PluginError, match="built-in"):
        PluginHost.activate({}, set_keys=lambda key: False, extra=[type("Console", (Plugin,), {})])


def test_a_constructor_that_fails_is_a_failure_of_its_plugin(activate: Activate) -> None:
    class Bad(Plugin):
        def __init__(self, config):
            raise OSError("no such device")

    with pytest.raises(PluginError, match=r"plugin bad .*failed in __init__: OSError: no such device"):
        activate(Bad).instantiate(Config())


def test_hooks_before_a_run_may_take_fewer_arguments_too(activate: Activate) -> None:
    class Few(Plugin):
        @classmethod
        @hookimpl
        def register_components(cls):
            seen.append(cls)

        @hookimpl
        def check_config(self):
            return [Finding("info", "few", "no argument is needed")]

    seen: list[type] = []
    host = activate(Few)
    host.register_components(Registry())
    host.instantiate(Config())
    assert seen == [Few]
    assert [finding.code for finding in host.check_config(Config(), None)] == ["few"]


@pytest.mark.parametrize(("answer", "part"), [(3, "returned a int"), ([3], "other things in it")])
def test_check_config_must_return_findings(activate: Activate, answer: object, part: str) -> None:
    class Bad(Plugin):
        @hookimpl
        def check_config(self, config):
            return answer

    host = activate(Bad)
    host.instantiate(Config())
    (finding,) = host.check_config(Config(), None)
    assert (finding.severity, finding.exit_code) == ("error", 5)
    assert part in finding.message


class Parts(Plugin):
    @classmethod
    @hookimpl
    def register_components(cls, registry):
        registry.add("schedule", "flat", "nowhere:flat")


def test_components_belong_to_who_adds_them(activate: Activate) -> None:
    registry = Registry()
    activate(Parts).register_components(registry)
    owner = f"parts ({__file__})"
    assert registry.get("schedule", "flat") == Component("schedule", "flat", "nowhere:flat", None, owner)


def test_a_component_that_exists_names_both_owners(activate: Activate) -> None:
    registry = Registry()
    registry.add("schedule", "flat", "somewhere:flat")
    with pytest.raises(PluginError, match="registered by both gpt-simple and parts"):
        activate(Parts).register_components(registry)


def test_registering_components_may_fail(activate: Activate) -> None:
    class Bad(Plugin):
        @classmethod
        @hookimpl
        def register_components(cls, registry):
            raise ImportError("no module lion")

    with pytest.raises(PluginError, match="failed in register_components: ImportError"):
        activate(Bad).register_components(Registry())


def test_the_order_hash_depends_on_plugins_and_not_on_arguments(activate: Activate) -> None:
    class Other(Plugin):
        pass

    assert activate(Sized, Other).order_hash() == activate(Other, Sized).order_hash()
    assert activate(Sized).order_hash() != activate(Other).order_hash()


def test_describe_leaves_out_the_silent_and_the_broken(activate: Activate) -> None:
    class Speaks(Plugin):
        def describe(self) -> dict[str, Any]:
            return {"fact": 1}

    class Breaks(Plugin):
        def describe(self) -> dict[str, Any]:
            raise ValueError

    class Unspeakable(Plugin):
        def describe(self) -> dict[str, Any]:
            return {"fact": {1, 2}}

    class Mumbles(Plugin):
        def describe(self) -> Any:
            return "fact"

    host = activate(Speaks, Breaks, Unspeakable, Mumbles, Sized)
    host.instantiate(Config())
    host.calls(True, lambda *failure: None)
    assert host.describe() == {"speaks": {"fact": 1}}


def test_names_in_the_code_of_a_plugin_are_found() -> None:
    class Helper(Plugin):
        def read(self, event: Any) -> Any:
            return [getattr(event, name) for name in ("loss", "grad_norm")]

    class Reads(Helper):
        @staticmethod
        def inner(event: Any) -> Any:
            return (lambda: event.learning_rate)()

    plugin = load_plugin("reads", Reads, None)
    names = ("grad_norm", "learning_rate", "loss", "skipped")
    assert [plugin.names(name) for name in names] == [True, True, True, False]
