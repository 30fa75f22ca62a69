"""Read a configuration from a file, or from the directory of a run, which run.json describes. Without torch."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt_simple.config.load import RawConfig, read
from gpt_simple.config.parsed import Parsed
from gpt_simple.config.redact import HIDDEN
from gpt_simple.errors import CheckpointError, ConfigError
from gpt_simple.plugin_host.discovery import DEFAULT_ON, ENABLED_BY
from gpt_simple.run_dir.layout import RunDir, runs_below
from gpt_simple.run_dir.lineage import RunRecord


def read_config(
    path: str | Path | None,
    *,
    overrides: Sequence[tuple[str, str]] = (),
    sections: Mapping[str, object] | None = None,
) -> RawConfig:
    """As ``read``; a directory stands for the configuration of the run in it, with this directory as its output_dir."""
    if path is None or not os.path.isdir(os.path.expanduser(path)):  # of a name that no file can have, too
        return read(path, overrides=overrides, sections=sections)
    run_dir = RunDir(Path(os.path.expanduser(path)))
    return read(run_dir.run_json, overrides=overrides, sections=sections, parsed=_values_of_run(run_dir))


def _values_of_run(run_dir: RunDir) -> Parsed:
    """What was set for the run in a directory, to go on with it: without secrets, which run.json does not hold.

    Its plugins are switched on by name; a plugin file has to be given again.
    """
    if not run_dir.run_json.exists():
        hint = runs_below(run_dir.root) or "a configuration is a .toml, .yaml or .json file, or the directory of a run"
        raise ConfigError("there is no run in this directory", location=str(run_dir.root), hint=hint)
    facts = RunRecord.load(run_dir).facts
    try:
        return _values_set(facts["config"], facts.get("origins", facts["config"]), facts["plugins"], run_dir)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run_dir.run_json} is damaged ({type(error).__name__}: {error})") from error


def _values_set(
    config: Mapping[str, Any], origins: Container[str], plugins: Mapping[str, str], run_dir: RunDir
) -> Parsed:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    notes: list[str] = []

    def put(key: str, value: Any) -> None:
        table, path = values, key.split(".")
        for depth, part in enumerate(path[:-1], 1):
            table = table.setdefault(part, {})
            lines[".".join(path[:depth])] = 0
        table[path[-1]] = value
        lines[key] = 0

    for name in sorted(plugins.keys() - DEFAULT_ON - ENABLED_BY.keys()):
        put(f"plugins.{name}", {})
    for flat, value in config.items():
        key = flat.replace("plugins.tables.", "plugins.", 1)
        parts = key.split(".")
        if ".".join(parts[: 3 if key != flat else 2]) not in origins or key == "training.resume":
            continue
        if HIDDEN in str(value):
            notes.append(f"{key} is a secret, which {run_dir.run_json} does not hold: give it again")
        else:
            put(key, value)
    if off := DEFAULT_ON - plugins.keys():
        put("plugins.disable", sorted(off.union(config.get("plugins.disable", ()))))
    put("training.output_dir", str(run_dir.root))
    return Parsed(values, lines, notes=notes)
