"""Registers the data source ``parquet``. pyarrow is imported when a run reads from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpt_simple import Plugin, hookimpl
from gpt_simple.hooks import NoConfig

if TYPE_CHECKING:
    from gpt_simple.hooks import Registry


class Parquet(Plugin[NoConfig]):
    """Registers ``data.source = "parquet"``."""

    @classmethod
    @hookimpl
    def register_components(cls, registry: Registry) -> None:
        registry.add("source", "parquet", "gpt_simple_parquet.source:build")
