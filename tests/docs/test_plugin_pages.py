"""The pages on plugins: the tutorial runs as written, recipes keep the contract, the reference is up to date."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt_simple import Plugin
from gpt_simple.hooks import HOOKS
from gpt_simple.testing import check_contract, train

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((DOCS / "plugins" / page).read_text(encoding="utf-8"))


def test_the_reference_of_hooks_is_the_catalogue() -> None:
    sys.path.insert(0, str(DOCS))
    try:
        from build_hook_reference import PAGE, page  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(DOCS))
    assert PAGE.read_text(encoding="utf-8") == page(), "outdated; run: python docs/build_hook_reference.py"
    assert all(f"## {hook}\n" in page() for hook in HOOKS)


def recipes() -> list[type[Plugin[Any]]]:
    namespace: dict[str, Any] = {"__name__": "cookbook"}
    for language, text in blocks("cookbook.md"):
        assert language == "python"
        exec(compile(text, "cookbook.md", "exec", dont_inherit=True), namespace)
    return [value for value in namespace.values() if isinstance(value, type) and value.__module__ == "cookbook"]


RECIPES = {cls.__name__: cls for cls in recipes() if issubclass(cls, Plugin)}
OPTIONS: dict[str, dict[str, Any]] = {
    "FreezeEmbedding": {"observes": False},
    "Sam": {"observes": False, "overrides": {"training.step": "sam"}},
    "Arithmetic": {
        "observes": False,
        "overrides": {"data.source": "sums", "data.packing": "best_fit", "data.val_fraction": 0.3},
    },
    "Zigzag": {"observes": False, "overrides": {"optimizer.schedule": "zigzag"}},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint of a model with the shape of the tiny one."""
    trained = train(output_dir=tmp_path_factory.mktemp("teacher"), max_steps=2, overrides={"training.seed": 7})
    return str(trained.result.checkpoint_path)


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_keep_the_contract(name: str, teacher: str) -> None:
    options = OPTIONS.get(name, {})
    if name == "Distill":
        options = {"observes": False, "overrides": {"training.loss": "distill", "plugins.distill.teacher": teacher}}
    check_contract(RECIPES[name], **options)


@pytest.mark.slow
def test_the_tutorial_works_as_it_is_written(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    site = tmp_path / "site"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(site),
        "OMP_NUM_THREADS": "1",
        # The package is installed into a directory of its own, and nothing is downloaded.
        "PIP_TARGET": str(site),
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
    }
    for language, text in blocks("tutorial.md"):
        first, _, rest = text.partition("\n")
        if first.startswith("# file: "):
            path = tmp_path / first.removeprefix("# file: ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(rest, encoding="utf-8")
        elif language == "console":
            script = "\n".join(line.removeprefix("$ ") for line in text.splitlines())
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        else:
            assert language == "", "a block of the tutorial that no test runs"
    assert len((tmp_path / "outputs" / "loss.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "outputs2" / "other.jsonl").exists()
    assert not list((tmp_path / "outputs3").glob("*loss*"))
