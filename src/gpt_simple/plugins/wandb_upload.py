"""Sends a finished run to Weights & Biases from its metrics.jsonl: ``gpt-simple wandb upload RUN``.

For runs whose machine had no network or no key, or whose W&B process died. Steps that a resumed run repeated are sent
once.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from attrs import evolve

from gpt_simple import CheckpointError, ConfigError, GptSimpleError, read_metrics, redacted
from gpt_simple.plugins.console_text import printable
from gpt_simple.plugins.wandb import WandbConfig, another, figures, is_installed, open_run

_SHOWN = 8
"""How many runs an error names."""


@click.group()
def wandb() -> None:
    """Weights & Biases: send a run that it has not seen."""


@wandb.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--project", help="W&B project; unset: the run's training.wandb_project.")
@click.option("--entity", help="User or team; unset: as the run was configured.")
@click.option("--name", help="Name of the W&B run; unset: as the run was configured.")
@click.option("--id", "run_id", help="W&B id; unset: the run's own, under which it also reports while it trains.")
@click.option("--offline", is_flag=True, help="Only write W&B's files under RUN/wandb, for `wandb sync` elsewhere.")
def upload(
    run: Path, project: str | None, entity: str | None, name: str | None, run_id: str | None, offline: bool
) -> None:
    """Send the metrics of the run in directory RUN to Weights & Biases, each step once and in order."""
    record, metrics = _read(run / "run.json"), run / "metrics.jsonl"
    if not metrics.exists():
        raise CheckpointError(f"{metrics} is missing: the run was made without the plugin metrics")
    if not is_installed():
        raise ConfigError('the package wandb is not installed: pip install "wandb>=0.31"')
    flat = record["facts"]["config"]
    project = project or flat.get("training.wandb_project")
    if project is None:
        raise ConfigError("the run names no W&B project: add --project NAME")
    values = nested(flat)
    config = WandbConfig(**values.get("plugins", {}).get("wandb", {}))
    config = evolve(
        config,
        entity=entity or config.entity,
        name=name or config.name or flat.get("training.wandb_run_name"),
        mode="offline" if offline else "online",
    )
    run_id = run_id or record["run_id"]
    try:
        sink = open_run(config, project=project, run_id=run_id, directory=run, values=redacted(values), resume="never")
        rows = [row for row in read_metrics(metrics) if row["kind"] in ("train", "eval")]
        for row in rows:
            sink.log(_values(row))
        if (summary := run / "summary.json").exists():
            sink.summary.update(figures(_read(summary)))
        sink.finish()
    except Exception as error:
        if "already exists" in str(error):  # its class stands for other errors, too
            raise GptSimpleError(
                f"W&B has a run {run_id} in {project} already, with what was sent while it trained or later, and takes"
                f" no second one: add --id {another(run_id)}, which sends all of it as another run"
            ) from error
        raise GptSimpleError(
            f"W&B did not take the run: {error}\nwithout an API key use `wandb login` first; without a network use"
            f" --offline; if W&B had run {run_id} and it was deleted there, add --id with another one"
        ) from error
    if not sink.offline:
        click.echo(printable(f"{len(rows)} rows of run {run_id} are at {sink.url}"))
        return
    written = Path(sink.settings.sync_dir)
    sync = f"`wandb sync {shlex.quote(str(written))}`"
    click.echo(printable(f"{len(rows)} rows of run {run_id} are written: {sync} sends them"))
    if others := sum(path != written for path in written.parent.glob("*run-*-*")):
        click.echo(f"sync only this one: the {others} before it there hold what single launches reported, parts of it")


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration in the shape of a file, from the dotted keys in run.json."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.replace("plugins.tables.", "plugins.", 1).split(".")
        table = result
        for part in path:
            table = table.setdefault(part, {})
        table[last] = value
    return result


def _values(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row that the plugin logs while the run trains, with its time."""
    missing = {name: float(value) for name, value in row.get("nonfinite", {}).items()}
    own = {key: value for key, value in row.items() if key not in ("kind", "time", "nonfinite") and value is not None}
    return {**own, **missing, "_timestamp": row["time"]}


def _read(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return document
    except FileNotFoundError:
        visible = "[!.]*"
        levels = f"{visible}/run.json", f"{visible}/{visible}/run.json"
        below = sorted(str(found.parent) for level in levels for found in path.parent.glob(level))
        hint = f"the runs below it are {', '.join(below[:_SHOWN])}{', ...' if below[_SHOWN:] else ''}" if below else ""
        hint = hint or "expected a training.output_dir of a run"
        raise CheckpointError(f"there is no run in {path.parent}: {hint}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): expected the directory of a run") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
