from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gpt_simple.config.load import RawConfig, read
from gpt_simple.config.schema import Config
from gpt_simple.config.structure import structure
from gpt_simple.errors import ConfigError


class Workbench:
    """Writes a file, reads it the way a run does, and shows its mistakes as lines."""

    def raw(self, text: str = "", suffix: str = ".toml", **sources: Any) -> RawConfig:
        path = Path(f"config{suffix}")
        path.write_text(text, encoding="utf-8")
        return read(path, **{"environ": {}, **sources})

    def config(self, text: str = "", suffix: str = ".toml", **sources: Any) -> Config:
        return structure(self.raw(text, suffix, **sources))

    def mistakes(
        self, text: str = "", suffix: str = ".toml", plugins: Mapping[str, type] | None = None, **sources: Any
    ) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            structure(self.raw(text, suffix, **sources), plugin_configs=plugins)
        return str(caught.value).splitlines()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    monkeypatch.chdir(tmp_path)
    return Workbench()
