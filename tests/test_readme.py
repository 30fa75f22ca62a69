"""The README's commands work as they are written, in a fresh clone too."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gpt_simple.cli.init import PRESETS
from tests.conftest import Shell

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def command(word: str) -> str:
    """The one shell line of the README that holds ``word``."""
    (found,) = [text.strip() for language, text in BLOCKS if language == "bash" and word in text]
    return found


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert command("nox -s tests") in (ROOT / ".ci/run").read_text().splitlines()


def test_the_plugin_of_the_readme_logs(shell: Shell, here: Path) -> None:
    (source,) = [text for language, text in BLOCKS if language == "python" and "# csvlog.py" in text]
    (here / "csvlog.py").write_text(source)
    assert shell("run", "config.toml", "-p", "./csvlog.py").code == 0
    rows = [line.split(",") for line in (here / "out/loss.csv").read_text().splitlines()]
    assert [int(step) for step, _ in rows] == [2, 4]
    assert shell("run", "config.toml", "-p", "./csvlog.py", "--plugins.csvlog.path=b.csv", "--force").code == 0
    assert (here / "out/b.csv").exists()


def test_the_example_on_own_text_works_as_it_is_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of its section in order, on a few modules of the standard library and with a smaller model."""
    (here / "config.toml").unlink()
    (here / "data").mkdir()
    for module in (argparse, json, re, subprocess, tomllib):
        file = Path(str(module.__file__))
        (here / "data" / f"{file.parent.name}-{file.name}").write_text(file.read_text(encoding="utf-8"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name, value in {"MODEL__N_EMBD": 32, "MODEL__N_LAYER": 1, "TRAINING__MAX_STEPS": 3}.items():
        monkeypatch.setenv(f"GPT_SIMPLE__{name}", str(value))
    section = README[README.index("**Train on your own text.**") : README.index("**Write a plugin.**")]
    shell, preset, _, python = re.findall(r"^```\w+\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert tomllib.loads(preset) == PRESETS["cpu"]
    done = subprocess.run(["bash", "-euc", shell], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "completed: finished all 3 steps" in done.stdout
    assert done.stdout.splitlines()[-1].strip()
    exec(python, {})


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quickstart_in_a_fresh_clone_learns(tmp_path: Path) -> None:
    """The first command of the README: a new virtual environment, the pinned packages, and a model that writes."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "VIRTUAL_ENV", "PYTHON"))
    }
    environment["GPT_SIMPLE_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(
        ["bash", "-c", command("quickstart.toml")],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((clone / "outputs/quickstart/summary.json").read_text())
    assert summary["floor"] < summary["final_val_loss"] < 1.4 * summary["floor"]
    assert "next:" in done.stdout
    text = summary["plugins"]["sample"]["sample"]
    assert len(re.findall(r"[a-z]+ [a-z]+", text)) > 10, text
