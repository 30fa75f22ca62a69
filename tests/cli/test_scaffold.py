"""From an empty directory to a plugin that a run uses, through a real wheel."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tomli

from gpt_simple.cli.main import main
from gpt_simple.cli.scaffold import KINDS, scaffold
from gpt_simple.errors import ConfigError
from gpt_simple.plugin_host.discovery import commands, installed, usable
from gpt_simple.plugin_host.loading import load_record
from gpt_simple.testing import check_contract, train
from tests.packages import FakePackage

PACKAGES = Path(__file__).parents[2] / "plugins"


def install(projects: Sequence[Path], target: Path) -> None:
    """Build wheels and install them, offline."""
    pytest.importorskip("hatchling")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*pip, "install", *options, "--target", str(target), *map(str, projects)], check=True)


@pytest.mark.slow
def test_new_packages_install_run_and_pass_their_own_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "site"
    names = {kind: f"fresh_{kind}" for kind in KINDS}
    for kind, name in names.items():
        folder = tmp_path / f"gpt-simple-fresh-{kind}"
        assert f"next: pip install -e {folder}" in scaffold(name, kind, str(tmp_path))
    projects = sorted(tmp_path.iterdir())
    install(projects, target)
    monkeypatch.syspath_prepend(str(target))
    records = usable(installed()) | usable(commands())
    for name in names.values():
        assert (records[name].origin, records[name].problem) == ("external", "")
    environment = {"PYTHONPATH": str(target), "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, projects)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout
    assert "20 passed" in done.stdout


def test_new_packages_are_formatted_and_typed_as_the_project_is(tmp_path: Path) -> None:
    for kind in KINDS:
        scaffold("some_plugin", kind, str(tmp_path / kind))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "$" not in text
            assert all(len(line) <= 120 and line == line.rstrip() for line in text.splitlines())
            assert path.suffix != ".toml" or tomli.loads(text)["project"]["name"] == "gpt-simple-some-plugin"


def test_the_former_templates_are_kinds_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plugins", "new", "mine", "--template", "component", "--directory", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert "--template is deprecated: use --kind schedule" in capsys.readouterr().err
    assert (
        'registry.add("schedule", "mine"'
        in (tmp_path / "gpt-simple-mine" / "src" / "gpt_simple_mine" / "__init__.py").read_text()
    )


@pytest.mark.parametrize(("name", "whose"), [("run", "a built-in command"), ("acme", "taken by acme-log 1.0")])
def test_a_name_that_a_command_has(name: str, whose: str, fake_package: FakePackage, tmp_path: Path) -> None:
    fake_package("acme-log", commands={"acme": "acme_cli:main"})
    with pytest.raises(ConfigError, match=f"'{name}' is {whose}: choose another name"):
        scaffold(name, "command", str(tmp_path / "new"))


@pytest.mark.parametrize("name", ["Csv", "csv-log", "strict", "console", "", "trainer", "lm", "csvlog_"])
def test_a_name_that_cannot_be_used_makes_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        scaffold(name, "logger", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_another_installed_package_has(fake_package: FakePackage, tmp_path: Path) -> None:
    fake_package("acme-log", plugins={"acme": "acme_log:Acme"})
    with pytest.raises(ConfigError, match=r"'acme' is taken by acme-log 1.0: choose another name"):
        scaffold("acme", "logger", str(tmp_path / "new"))
    fake_package("gpt-simple-mine", plugins={"mine": "gpt_simple_mine:Mine"})
    scaffold("mine", "logger", str(tmp_path / "new"))  # the same package once more


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "gpt-simple-mine").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        scaffold("mine", "logger", str(tmp_path))
    assert list((tmp_path / "gpt-simple-mine").iterdir()) == []


def test_csvlog_from_its_wheel_receives_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "site"
    install([PACKAGES / "gpt-simple-csvlog"], target)
    monkeypatch.syspath_prepend(str(target))
    record = usable(installed())["csvlog"]
    assert record.distribution == "gpt-simple-csvlog"
    train(enable=("csvlog",), output_dir=tmp_path / "run", overrides={"plugins.csvlog.columns": ["train/loss"]})
    assert (tmp_path / "run" / "train.csv").read_text().splitlines()[0] == "step,tokens,train/loss"
    check_contract(load_record(record), enable=("csvlog",))  # type: ignore[arg-type]


def test_early_stopping_from_its_wheel_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "site"
    install([PACKAGES / "gpt-simple-early-stopping"], target)
    monkeypatch.syspath_prepend(str(target))
    assert usable(installed())["early_stopping"].distribution == "gpt-simple-early-stopping"
    options = {"plugins.early_stopping.patience": 1, "plugins.early_stopping.min_delta": 10.0}
    first, again = (train(output_dir=tmp_path / "run", max_steps=9, overrides=options).result for _ in range(2))
    assert (first.status, first.steps) == (again.status, again.steps) == ("completed", 4)
    assert f"completed at step 4 of 9 ({first.reason})" in again.reason
