"""Errors are data: codes, places, severities and the exit code do not depend on the words of any message."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt_simple.errors import Problem
from gpt_simple.hooks.results import Finding
from gpt_simple.preflight.findings import exit_code
from tests.conftest import CONFIG, Shell

PARTS = """
from gpt_simple import ConfigError, Plugin, hookimpl

class Parts(Plugin):
    @classmethod
    @hookimpl
    def register_components(cls, registry):
        registry.add("model", "lost", "nowhere:build")

    @hookimpl
    def check_config(self, config):
        if config.training.seed == 13:
            raise ConfigError("model.n_embd: unlucky; choose another")
        return []
"""
NAMES = '[plugins]\ndisable = ["wandbb"]\nrequire = ["memory"]\n[plugins.nope]\nx = 1\n'
MIX = "[[data.curriculum]]\nduration_tokens = 9999\nmix = {%s}\n"
TWICE = "max_steps = 4\nmax_steps = 5\n"

Row = tuple[str, str, str, int]


def replace_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace every message and every hint by a meaningless text; the same one for the same text."""
    texts: dict[str, str] = {}

    def without_words(cls: type, method: str) -> None:
        made = getattr(cls, method)
        signature = inspect.signature(made)

        def make(*arguments: Any, **named: Any) -> Any:
            given = signature.bind(*arguments, **named)
            for field in ("message", "hint"):
                if given.arguments.get(field):
                    given.arguments[field] = texts.setdefault(given.arguments[field], f"x{len(texts)}")
            return made(*given.args, **given.kwargs)

        monkeypatch.setattr(cls, method, make)

    without_words(Problem, "__new__")
    without_words(Finding, "__init__")


def rows(findings: list[dict[str, Any]]) -> Iterator[Row]:
    for finding in findings:
        yield finding["severity"], finding["code"], finding["place"], finding["exit_code"]


@pytest.mark.parametrize(
    ("text", "arguments", "code", "row"),
    [
        (CONFIG.replace("n_layer", "n_layers"), [], 2, ("config", "config.toml:3 (model.n_layers)")),
        ("[modl]\nx = 1\n" + CONFIG, [], 2, ("config", "config.toml:1 (modl)")),
        (CONFIG.replace("n_head = 2", "n_head = 0"), ["--training.seed=x"], 2, ("config", "--training.seed")),
        (CONFIG, ["--model.n_head=5"], 2, ("config", "config.toml:2 (model.n_embd), --model.n_head")),
        (CONFIG.replace("max_steps = 4\n", TWICE), [], 2, ("config", "config.toml:14:14 (training.max_steps)")),
        (CONFIG.replace("max_steps = 4\n", "foo = abc\n"), [], 2, ("config", "config.toml:13:7")),
        (CONFIG.replace('source = "stories"', 'path = "lost"'), [], 3, ("data-refused", "config.toml:7 (data.path)")),
        (CONFIG, ["--data.source=files"], 3, ("data-refused", "data.path")),
        (CONFIG + MIX % "storiez = 1", [], 2, ("data-refused", "config.toml:25 (data.curriculum)")),
        (CONFIG + MIX % "all = -1", [], 2, ("config", "config.toml:27 (data.curriculum[0].mix)")),
        (CONFIG, ["--model.name=gptt"], 2, ("config", "--model.name")),
        (CONFIG, ["-p", "./parts.py", "--model.name=lost"], 5, ("component-refused", "--model.name")),
        (CONFIG, ["-p", "./parts.py", "--training.seed=13"], 5, ("plugin-failed", "")),
        (CONFIG + NAMES, ["-p", "gone"], 2, ("config", "config.toml:28 (plugins.nope)")),
        (CONFIG + NAMES, ["-p", "gone"], 2, ("config", "-p gone")),
        (CONFIG, ["--model.vocab_size=100"], 2, ("vocabulary-too-small", "--model.vocab_size")),
        (CONFIG, ["--training.output_dir=parts.py"], 2, ("output-refused", "--training.output_dir")),
        (CONFIG, ["--training.resume=gone"], 4, ("resume-refused", "--training.resume")),
        (CONFIG, ["--device=zx81"], 2, ("memory-refused", "--device zx81")),
        (CONFIG, ["--bogus"], 2, ("usage", "")),
        (CONFIG, ["--training.seed"], 2, ("usage", "--training.seed")),
    ],
)
def test_what_is_found_does_not_depend_on_words(
    shell: Shell,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    arguments: list[str],
    code: int,
    row: tuple[str, str],
) -> None:
    (here / "parts.py").write_text(PARTS)
    (here / "config.toml").write_text(text)
    same_without_words(shell, monkeypatch, arguments, code, row)


def test_a_checkpoint_of_another_model_is_found_without_words(
    shell: Shell, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shell("run", "config.toml", "--quiet").code == 0
    row = ("resume-refused", "training.resume")
    same_without_words(shell, monkeypatch, ["--model.n_layer=2", "--training.max_steps=9"], 4, row)


def test_a_run_that_goes_on_otherwise_is_found_without_words(
    shell: Shell, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shell("run", "config.toml", "--quiet").code == 0
    changes = ["--optimizer.learning_rate=1e-5", "--training.max_steps=9"]
    same_without_words(shell, monkeypatch, changes, 0, ("resume-changed", "training.resume"))


def same_without_words(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, row: tuple[str, str]
) -> None:
    """``validate`` finds ``row`` (code and place) among others, and the same without words."""
    before = shell("validate", "config.toml", "--json", *arguments)
    replace_words(monkeypatch)
    wordless = shell("validate", "config.toml", "--json", *arguments)
    assert before.code == wordless.code == code, before.out + before.err
    found, again = json.loads(before.out)["findings"], json.loads(wordless.out)["findings"]
    assert row in {(finding["code"], finding["place"]) for finding in found}
    assert list(rows(again)) == list(rows(found))
    assert {finding["message"][0] for finding in again} == {"x"}


def test_the_exit_code_is_that_of_the_worst_class() -> None:
    findings = [
        Finding("error", "a", ""),
        Finding("error", "b", "", exit_code=4),
        Finding("warning", "c", "", exit_code=5),
    ]
    assert exit_code(findings) == 4
    assert exit_code(findings, strict=True) == 5
    assert exit_code([]) == 0
