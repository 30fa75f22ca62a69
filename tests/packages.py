"""Packages that exist only in a temporary directory: what is installed is what lies on ``sys.path``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from gpt_simple.hooks import Plugin
from gpt_simple.plugin_host.activation import Switches
from gpt_simple.plugin_host.discovery import DEFAULT_ON
from gpt_simple.plugin_host.host import PluginHost

FakePackage = Callable[..., Path]

PLUGIN = """
from gpt_simple import Plugin, hookimpl

class {cls}(Plugin):
    @hookimpl
    def on_metrics(self, run, event):
        pass
"""


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePackage]:
    """``fake_package("acme-log", plugins={"acme": "acme_log:Acme"}, modules={"acme_log": source})`` installs it."""
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install(
        distribution: str,
        *,
        version: str = "1.0",
        plugins: Mapping[str, str] | None = None,
        commands: Mapping[str, str] | None = None,
        modules: Mapping[str, str] | None = None,
        requires: Sequence[str] = (),
        summary: str = "",
        site: Path = site,
    ) -> Path:
        info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
        lines += [f"Summary: {summary}"] if summary else []
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        groups = {"gpt_simple.plugins": plugins or {}, "gpt_simple.commands": commands or {}}
        text = "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items())
            for group, entries in groups.items()
            if entries
        )
        (info / "entry_points.txt").write_text(text)
        for name, source in (modules or {}).items():
            (site / f"{name}.py").write_text(source)
        return site

    yield install
    for name, module in list(sys.modules.items()):
        if str(tmp_path) in (getattr(module, "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def bare() -> Switches:
    """No built-in plugin: what a test passes is all there is."""
    return Switches(disable=tuple(sorted(DEFAULT_ON)))


@pytest.fixture
def activate(bare: Switches) -> Callable[..., PluginHost]:
    """A host of exactly the plugins that are passed."""

    def make(*plugins: Plugin | type[Plugin], **table: object) -> PluginHost:
        return PluginHost.activate(table, set_keys=lambda key: False, switches=bare, extra=plugins)

    return make
