"""A type checker sees a wrong event, arity or result of a hook; mypy knows the contract through ``Plugin``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

SOURCE = """
from collections.abc import Mapping

from attrs import frozen

from gpt_simple import Metric, Plugin, Run, hookimpl
from gpt_simple.hooks import CollectMetrics, MetricsReady, NoConfig, Registry, StepEnd


@frozen
class Config:
    path: str = "x"


class Good(Plugin[Config]):
    Config = Config

    @hookimpl
    def on_metrics(self, run: Run, event: MetricsReady) -> None:
        print(event.metrics[self.config.path], run.step)

    @hookimpl
    def collect_metrics(self, run: Run, event: CollectMetrics) -> dict[str, Metric]:
        return {"a": Metric(1.0)}

    @classmethod
    @hookimpl
    def register_components(cls, registry: Registry) -> None:
        registry.add("schedule", "a", "b:c")


class Bad(Plugin[NoConfig]):
    @hookimpl
    def on_metrics(self, run: Run, event: StepEnd) -> None:  # wrong event
        pass

    @hookimpl
    def on_step_end(self, run: Run) -> None:  # wrong arity
        pass

    @hookimpl
    def collect_metrics(self, run: Run, event: CollectMetrics) -> Mapping[str, float]:  # wrong result
        return {}

    @hookimpl
    def on_close(self, run: Run, event: int) -> None:  # wrong event
        print(run.no_such_thing)  # wrong attribute
"""


def test_mypy_finds_what_is_wrong_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "plugin.py"
    file.write_text(SOURCE)
    # torch is left out: its stubs take half a minute, and the contract names it for tensors only.
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\n[mypy-torch.*]\nfollow_imports = skip\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "plugin.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    found = {int(line) for line in re.findall(r"^plugin\.py:(\d+): error", done.stdout, re.MULTILINE)}
    expected = {number for number, line in enumerate(SOURCE.splitlines(), 1) if "# wrong" in line}
    assert found == expected, done.stdout
