"""The code blocks of the pages run as they are written.

The fenced blocks of a page run in order in one empty directory. ``# file: NAME`` on the first line writes the block to
a file; ``bash`` runs in a shell; ``python`` runs in one namespace per page; ``toml`` and ``yaml`` must be valid
configurations. Blocks without a language are text.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_simple import Plugin
from gpt_simple.spec import resolve_spec

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    namespace: dict[str, object] = {"__name__": "page"}
    for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        _run_block(page, language, text, namespace)


def _run_block(page: Path, language: str, text: str, namespace: dict[str, object]) -> None:
    first, _, rest = text.partition("\n")
    if named := re.fullmatch(r"# file: (\S+)", first):
        path = Path(named[1])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rest, encoding="utf-8")
    elif language == "bash":
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{page.name}:\n{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    elif language == "python":
        exec(compile(text, str(page), "exec", dont_inherit=True), namespace)
    elif language in ("toml", "yaml"):
        path = Path(f"block.{language}")
        path.write_text(text, encoding="utf-8")
        own = [each for each in namespace.values() if isinstance(each, type) and each.__module__ == "page"]
        resolve_spec(path, plugins=[each for each in own if issubclass(each, Plugin)])


def test_the_architecture_names_what_is_there() -> None:
    text, package = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"), ROOT / "src" / "gpt_simple"
    tables = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|.*\| *((?:`\w+\.py`(?:, )?)*) *\|$", text, re.MULTILINE)
    named = {name for names, _ in tables for name in re.findall(r"\w+", names)}
    there = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert named == there - {"__init__", "__main__", "spec", "api"}
    for name, files in tables:
        assert all((package / name.strip("`") / file).is_file() for file in re.findall(r"\w+\.py", files)), name
    stages = " ".join(re.findall(r"^\| \w+ \| (`[^|]+`) \|", text, re.MULTILINE))
    code = [(path.stem, path.read_text(encoding="utf-8")) for path in package.rglob("*.py")]
    methods = re.findall(r"`(\w+)\.(\w+)`", stages)
    assert ("Trainer", "fit") in methods
    for owner, name in methods:
        homes = [body for stem, body in code if stem == owner or re.search(rf"^class {owner}\b", body, re.M)]
        assert any(f"def {name}(" in body for body in homes), f"{owner}.{name}"


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for name, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in _anchors(target), f"{name}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
