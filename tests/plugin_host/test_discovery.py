"""What is installed, found without importing it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from gpt_simple import __version__
from gpt_simple._names import DISTRIBUTION
from gpt_simple.plugin_host.discovery import DEFAULT_ON, commands, installed, name_problem, summary, usable
from tests.packages import FakePackage


def problems() -> dict[tuple[str, str], str]:
    return {(record.name, record.distribution): record.problem for record in installed()}


def test_built_in_plugins_are_entry_points_of_this_distribution() -> None:
    builtin = {record.name for record in installed() if record.origin == "builtin"}
    assert builtin >= DEFAULT_ON


def test_a_package_is_found_by_metadata_and_not_imported(fake_package: FakePackage) -> None:
    fake_package("acme-log", plugins={"acme": "acme_log:Acme"}, summary="Logs for Acme.", version="2.1")
    record = usable(installed())["acme"]
    assert (record.distribution, record.version, record.origin) == ("acme-log", "2.1", "external")
    assert summary(record) == "Logs for Acme."
    assert "acme_log" not in sys.modules


def test_a_built_in_has_a_summary_and_is_not_imported() -> None:
    record = usable(installed())["console"]
    module = record.value.partition(":")[0]
    imported = module in sys.modules
    assert summary(record).endswith(".")
    assert (module in sys.modules) == imported


def test_the_name_of_a_built_in_cannot_be_taken(fake_package: FakePackage) -> None:
    fake_package("thief", plugins={"console": "thief:Console"})
    assert problems()["console", "thief"] == "shadowed"
    assert usable(installed())["console"].distribution == DISTRIBUTION


def test_two_packages_of_one_name_are_both_named(fake_package: FakePackage) -> None:
    fake_package("acme-one", plugins={"acme": "one:Acme"})
    fake_package("acme-two", plugins={"acme": "two:Acme"})
    detail = usable(installed())["acme"].detail
    assert "acme-one" in detail
    assert "acme-two" in detail


@pytest.mark.parametrize(
    ("requirement", "problem"),
    [
        (f"{DISTRIBUTION}>=999", "incompatible"),
        (f"{DISTRIBUTION.replace('-', '_').upper()}<{__version__}", "incompatible"),
        (f"{DISTRIBUTION}>={__version__}", ""),
        (DISTRIBUTION, ""),
        (f"{DISTRIBUTION}>=999; extra == 'test'", ""),
        (f"{DISTRIBUTION}-extras>=999", ""),
        ("this is not a requirement", ""),
    ],
)
def test_a_package_that_needs_another_version_of_us(fake_package: FakePackage, requirement: str, problem: str) -> None:
    fake_package("acme-log", plugins={"acme": "acme:Acme"}, requires=["attrs", requirement])
    assert problems()["acme", "acme-log"] == problem


@pytest.mark.parametrize("name", ["Acme", "acme-log", "1acme", "disable", "require", "strict", "a.b"])
def test_names_that_cannot_be_a_table(fake_package: FakePackage, name: str) -> None:
    assert name_problem(name)
    fake_package("acme-log", plugins={name: "acme:Acme"})
    assert problems()[name, "acme-log"] == "bad name"


def test_the_order_is_by_name_and_not_by_file_system(
    fake_package: FakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("zeta", "acme", "mid"):
        fake_package(f"{name}-log", plugins={name: f"{name}:X"})
    first = [(record.name, record.distribution) for record in installed()]
    monkeypatch.setattr(sys, "path", [*sys.path[1:], sys.path[0]])
    assert [(record.name, record.distribution) for record in installed()] == first == sorted(first)


def test_an_older_copy_on_the_path_is_not_a_second_package(
    fake_package: FakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package("acme-log", plugins={"acme": "acme:Acme"}, version="2.0")
    below = fake_package("acme-log", plugins={"acme": "acme:Acme"}, version="1.0", site=tmp_path / "below")
    monkeypatch.setattr(sys, "path", [*sys.path, str(below)])
    assert problems()["acme", "acme-log"] == ""
    assert usable(installed())["acme"].version == "2.0"


def test_commands_of_other_packages_are_found(fake_package: FakePackage) -> None:
    fake_package("acme-log", commands={"acme": "acme:main"})
    assert "acme" in usable(commands())


def test_a_built_in_summary_is_the_first_line_of_its_docstring() -> None:
    own = [record for record in (*installed(), *commands()) if record.origin == "builtin"]
    assert len(own) > 20
    for record in own:
        module = importlib.import_module(record.value.partition(":")[0])
        assert summary(record) == (module.__doc__ or "").partition("\n")[0].replace("``", "") != ""


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("entry_points.txt", b"[gpt_simple.plugins]\nno equals sign\n"),
        ("entry_points.txt", b"[somebody.else]\nno equals sign\n"),
        ("entry_points.txt", b"[gpt_simple.plugins]\nbad = \xff\xfe:X\n"),
        ("METADATA", None),
        ("METADATA", b"Metadata-Version: 2.1\nName: broken\n"),
        ("METADATA", b"\xff\xfe"),
    ],
)
@pytest.mark.parametrize("group", ["plugins", "commands"])
def test_damaged_metadata_of_one_package_hides_no_other(
    fake_package: FakePackage, file: str, content: bytes | None, group: str
) -> None:
    fake_package("acme-log", plugins={"acme": "acme_log:Acme"}, commands={"acme": "acme_log:main"})
    site = fake_package("broken", plugins={"broken": "broken:X"}, commands={"broken": "broken:main"})
    damaged = site / "broken-1.0.dist-info" / file
    if content is None:
        damaged.unlink()
    else:
        damaged.write_bytes(content)
    found = usable(installed(f"gpt_simple.{group}"))
    assert found["acme"].distribution == "acme-log"
    assert {record.name for record in found.values() if record.origin == "builtin"} >= (
        DEFAULT_ON if group == "plugins" else {"run", "validate"}
    )
