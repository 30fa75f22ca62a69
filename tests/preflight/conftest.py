"""``gpt-simple validate`` as findings, and a cache for each test: prepared data change what is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Shell

Check = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture(autouse=True)
def _own_cache(
    clean_environment: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT_SIMPLE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def check(shell: Shell, here: Path) -> Check:
    """``validate config.toml --json`` with more arguments: the findings by their codes."""

    def run(*arguments: str, code: int = 0, config: str = "config.toml") -> dict[str, dict[str, Any]]:
        ended = shell("validate", config, "--json", *arguments)
        assert ended.code == code, ended.out + ended.err
        document = json.loads(ended.out)
        assert document["exit_code"] == code
        return {finding["code"]: finding for finding in document["findings"]}

    return run
