"""What W&B's offline runs hold, read back with W&B's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from attrs import frozen


@frozen
class Sent:
    """What one launch gave to W&B."""

    id: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    exit_code: int | None


def sent(directory: Path) -> list[Sent]:
    """The launches of a run in their order."""
    return [read(file) for file in files(directory)]


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("wandb/*run-*/run-*.wandb"))


def read(file: Path) -> Sent:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    records: dict[str, list[Any]] = {}
    for record in map(json.loads, lines):
        records.setdefault(record["type"], []).append(record.get(record["type"]))
    config: dict[str, Any] = {}
    for update in (*records["run"], *records.get("config", ())):
        config |= update.get("config", update).get("update", {})
    summary: dict[str, Any] = {}
    for update in records.get("summary", ()):
        summary |= update.get("update", {})
    rows = [row["item"] for row in records.get("history", ())]
    codes = [exit.get("exit_code", 0) for exit in records.get("exit", ())]
    return Sent(records["run"][0]["run_id"], config, rows, summary, records["metric"], codes[0] if codes else None)
