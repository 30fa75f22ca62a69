"""Tokens that were prepared before: a dataset directory, used where it is."""

from __future__ import annotations

from pathlib import Path

from attrs import frozen

from gpt_simple.config.schema import DataConfig
from gpt_simple.data.manifest import FILE, WORK, unfinished
from gpt_simple.data.nanogpt import TRAIN, NanoGpt
from gpt_simple.errors import DataError


@frozen
class Shards:
    """A directory with a dataset, or with nanoGPT's files."""

    directory: Path
    nanogpt: NanoGpt | None = None


def build(config: DataConfig, seed: int) -> Shards:
    """The directory that ``data.path`` names: a dataset, or nanoGPT's files."""
    if not isinstance(config.path, str) or not config.path:
        raise DataError("expected one directory of token shards (with a dataset.json)", key="data.path")
    directory = Path(config.path)
    if not (directory / FILE).is_file():
        if (directory / TRAIN).is_file():
            return Shards(directory, NanoGpt(directory))
        if (directory / WORK).is_dir():
            raise unfinished(directory)
        raise DataError(
            f"{directory}: there is no {FILE} (or {TRAIN} of nanoGPT)",
            key="data.path",
            hint="expected a directory of token shards, or data.format = 'text' or 'jsonl'",
        )
    return Shards(directory)
