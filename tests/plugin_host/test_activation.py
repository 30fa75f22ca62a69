"""Which plugins a run has: installed is not active, and later wins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import gpt_simple
from gpt_simple import Config, DataConfig, ModelConfig, OptimizerConfig, PluginsConfig, TrainingConfig
from gpt_simple.errors import ConfigError
from gpt_simple.plugin_host.activation import PluginsTable, Switches, decide
from gpt_simple.plugin_host.discovery import PluginRecord
from tests.packages import PLUGIN, FakePackage
from tests.tiny import TINY

SECTIONS = {"model": ModelConfig, "data": DataConfig, "optimizer": OptimizerConfig}
RECORDS = {
    "console": PluginRecord("console", "m:C", "gpt-simple-trainer", "1", "builtin"),
    "wandb": PluginRecord("wandb", "m:W", "gpt-simple-trainer", "1", "builtin"),
    "memory": PluginRecord("memory", "m:M", "gpt-simple-trainer", "1", "builtin"),
    "acme": PluginRecord("acme", "a:A", "acme-log", "1", "external"),
}


def active(
    table: dict[str, object] | None = None,
    *switches: str,
    no_plugins: bool = False,
    is_set: Callable[[str], bool] = lambda key: False,
) -> dict[str, str]:
    decisions = decide(RECORDS, PluginsTable.read(table or {}), is_set, Switches.parse(switches, no_plugins=no_plugins))
    return {name: decision.why for name, decision in decisions.items() if decision.active}


def test_installed_is_not_active() -> None:
    assert active() == {"console": "default"}


def test_a_table_switches_on_even_an_empty_one() -> None:
    assert active({"acme": {}, "memory": None}) == {
        "acme": "[plugins.acme]",
        "console": "default",
        "memory": "[plugins.memory]",
    }


def test_disable_beats_a_table_and_the_defaults() -> None:
    assert active({"acme": {}, "disable": ["acme", "console"]}) == {}


def test_no_plugins_leaves_the_built_in_ones() -> None:
    assert active({"acme": {}, "memory": {}}, no_plugins=True).keys() == {"console", "memory"}


def test_the_command_line_has_the_last_word() -> None:
    assert active({"disable": ["acme", "console"]}, "acme", "console") == {"acme": "-p", "console": "-p"}
    assert active({"acme": {}}, "acme", no_plugins=True) == {"acme": "-p", "console": "default"}
    assert active({"acme": {}}, "no:acme", "no:console") == {}


def test_of_two_words_on_one_name_the_later_counts() -> None:
    assert active({}, "no:acme", "acme")["acme"] == "-p"
    assert "acme" not in active({}, "acme", "no:acme")


def test_a_field_can_switch_a_built_in_on_and_then_a_table_does_not() -> None:
    assert "wandb" not in active({"wandb": {}})
    by_field = active({}, is_set=lambda key: key == "training.wandb_project")
    assert by_field["wandb"] == "training.wandb_project"
    assert "wandb" in active({}, "wandb")


def test_all_unknown_names_are_told_with_their_places() -> None:
    plugins = PluginsTable.read({"consle": {}, "disable": ["acm"], "require": ["nothing_like_it"]})
    with pytest.raises(ConfigError) as caught:
        decide(RECORDS, plugins, lambda key: False, Switches.parse(["acne", "no:memry"]))
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("plugins.consle: no plugin 'consle' is installed; did you mean 'console'?")
    assert "did you mean 'acme'?" in lines[1]
    assert "did you mean" not in lines[2]
    assert lines[3].startswith("-p acne")
    assert lines[4].startswith("-p no:memry")


def test_a_required_plugin_that_is_off_stops_the_run() -> None:
    for needed, table, switches, advice in (
        ("acme", {}, ("--no-plugins",), r"\(--no-plugins\): leave that out, or add -p acme"),
        ("acme", {}, ("no:acme",), r"\(-p no:acme\): leave out -p no:acme$"),
        ("acme", {"disable": ["acme"]}, (), r"\(plugins.disable\): take it out of that list, or add -p acme"),
        ("memory", {}, (), r"\(not asked for\): add \[plugins.memory\], or add -p memory"),
        ("wandb", {}, (), r"\(training.wandb_project is unset\): set training.wandb_project, or add -p wandb"),
    ):
        words, bare = (word for word in switches if ":" in word), "--no-plugins" in switches
        with pytest.raises(ConfigError, match=f"'{needed}' is required but not active {advice}"):
            active({"acme": {}, "require": [needed], **table}, *words, no_plugins=bare)
    assert active({"acme": {}, "require": ["acme"]})["acme"] == "[plugins.acme]"


def test_wrong_types_are_left_to_the_structuring() -> None:
    assert active({"disable": 3, "require": {"a": 1}, "strict": "yes"}) == {"console": "default"}


def test_files_are_told_from_names() -> None:
    switches = Switches.parse(["acme", "./mine.py", "no:console", "dir/other.py"])
    assert switches.files == ("./mine.py", "dir/other.py")


def test_a_table_switches_a_package_on_in_python_too(fake_package: FakePackage, tmp_path: Path) -> None:
    """``train`` is given no switches of a command line."""
    for name in ("acme", "other"):
        module, cls = f"{name}_log", name.title()
        plugins, modules = {name: f"{module}:{cls}"}, {module: PLUGIN.format(cls=cls)}
        fake_package(f"{name}-log", plugins=plugins, modules=modules)
    training = TINY["training"] | {"max_steps": 1, "output_dir": str(tmp_path / "run")}
    sections = {name: cls(**TINY[name]) for name, cls in SECTIONS.items()}
    config = Config(**sections, training=TrainingConfig(**training), plugins=PluginsConfig(tables={"acme": {}}))
    active = gpt_simple.train(config).summary["plugin_seconds"]
    assert "acme" in active
    assert "other" not in active
