"""The page: facts, charts over three axes, configuration, samples and events. It needs no script.

It is well-formed XML as well as HTML, so that a parser can check it.
"""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from gpt_simple._names import PROGRAM, __version__
from gpt_simple.report.figures import AXIS_NAMES, duration, figures, si
from gpt_simple.report.history import AXES, History, Row

SIGNATURE = f"<footer>{PROGRAM}"
"""Near the end of every report, by which a later one recognises a file that it may replace."""

_KEYS = {
    "training": '<path class="line" d="M0 7H30"/>',
    "validation": '<path class="dots" d="M0 7H30"/><path class="points" d="M15 7h0"/>',
    "floor": '<path class="level" d="M0 7H30"/>',
    "resumed": '<path class="resume" d="M15 0V14"/>',
    "skipped steps": '<path class="skipped" d="M15 5V14"/>',
}
"""The lines of the drawings and what they mean."""

_CHECKED = ' checked=""'
_SAMPLES = 12
_EVENTS = 50


def page(histories: Sequence[History]) -> str:
    """The report about these runs, as one HTML document."""
    names = _text(", ".join(history.label for history in histories))
    radios = "".join(
        f'<input type="radio" name="axis" id="axis-{axis}"{_CHECKED if axis == "step" else ""}/>' for axis in AXES
    )
    labels = "".join(f'<label for="axis-{axis}">{AXIS_NAMES[axis]}</label>' for axis in AXES)
    body = [
        _table(histories, [_facts(history) for history in histories]),
        f'<nav aria-label="horizontal axis">over {labels}</nav>',
        _legend(histories),
        f'<div class="charts">{"".join(figures(histories))}</div>',
        _configuration(histories),
        *map(_samples, histories),
        *map(_events, histories),
    ]
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        '<meta name="color-scheme" content="light dark"/>'
        f"<title>{names}</title><style>{style}</style></head>\n"
        f"<body>{radios}<main><h1>{names}</h1>\n{chr(10).join(filter(None, body))}\n"
        f"{SIGNATURE} {__version__}, {datetime.datetime.now():%Y-%m-%d %H:%M}</footer></main></body></html>\n"
    )


def _table(histories: Sequence[History], columns: Sequence[Mapping[str, Any]]) -> str:
    """A row for each name and a column for each run; one run needs no heading, as it is that of the page."""
    labels = "".join(f"<th>{_text(history.label)}</th>" for history in histories)
    head = f"<thead><tr><th></th>{labels}</tr></thead>" if len(histories) > 1 else ""
    rows = ""
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = "".join(f"<td>{_text(column.get(name, '-'))}</td>" for column in columns)
        rows += f"<tr><th>{_text(name)}</th>{cells}</tr>"
    return f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'


def _facts(history: History) -> dict[str, str]:
    """The first table: from the rows of all processes, and from the summary of the last one."""
    facts, status = history.facts, history.status
    # The summary of a run that is running or was lost belongs to an earlier process.
    summary = history.summary if status.state in ("completed", "stopped") else {}
    train = history.rows["train"][-1] if history.rows["train"] else {}
    evals = history.values("eval/loss")
    bits, rates, memory = map(history.values, ("eval/bits_per_byte", "perf/tokens_per_second", "memory/peak_gib"))
    of_steps = f" of {status.max_steps:,}" if status.max_steps else ""
    values = {
        "status": status.state + (f": {status.reason}" if status.reason else ""),
        # The status may be a second old.
        "steps": f"{max(status.step, train.get('step', 0)):,}" + of_steps,
        "tokens": si(train["tokens"]) if train else None,
        "training loss": _last(history.rows["train"], "train/loss"),
        "validation loss": _last(history.rows["eval"], "eval/loss"),
        "best validation loss": _number(min(evals, default=None)),
        "perplexity": f"{math.exp(min(evals[-1], 99)):.4g}" if evals else None,
        "floor": _number(facts.get("floor")),
        "bits per byte": _number(bits[-1] if bits else None),
        "median tokens/s": si(statistics.median(rates)) if rates else None,
        "peak memory": f"{max(memory):.2f} GiB" if memory else None,
        "time to the last training row": duration(history.elapsed(train["time"])) if train else None,
        "processes started": str(len(history.launches)),
        "time of the last process": duration(summary["seconds"]) if summary.get("seconds") else None,
        "its time in plugins": _plugins(summary.get("plugin_seconds", {})),
        "parameters": f"{facts['parameters']:,}" if facts.get("parameters") else None,
        "device": facts.get("device"),
        "precision": facts.get("precision"),
        "compile": facts.get("compile"),
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def _plugins(seconds: Mapping[str, float]) -> str | None:
    """The time of the last process in plugins, and the three that took most of it."""
    if not seconds:
        return None
    most = sorted(seconds, key=seconds.__getitem__, reverse=True)[:3]
    return f"{duration(sum(seconds.values()))} ({', '.join(f'{name} {duration(seconds[name])}' for name in most)})"


def _legend(histories: Sequence[History]) -> str:
    runs = "".join(
        f'<li class="c{index % 8}"><span class="swatch"></span>{_text(history.label)}</li>'
        for index, history in enumerate(histories)
    )
    happened = {
        "floor": any(history.facts.get("floor") is not None for history in histories),
        "resumed": any(len(history.launches) > 1 for history in histories),
        "skipped steps": any(history.values("train/skipped_steps") for history in histories),
    }
    kinds = "".join(
        f'<li><svg class="key" viewBox="0 0 30 14" aria-hidden="true">{drawing}</svg>{name}</li>'
        for name, drawing in _KEYS.items()
        if happened.get(name, True)
    )
    return f'<ul class="legend">{runs}{kinds}</ul>'


def _configuration(histories: Sequence[History]) -> str:
    if len(histories) > 1:
        title = "Differences of configuration"
        keys = dict.fromkeys(key for history in histories for key in history.config)
        shown = {key for key in keys if len({str(history.config.get(key)) for history in histories}) > 1}
    else:
        title = "Configuration: what was chosen"
        shown = {key for key, origin in histories[0].origins.items() if origin != "default"}
    columns = [{key: value for key, value in history.config.items() if key in shown} for history in histories]
    return f"<h2>{title}</h2>{_table(histories, columns) if any(columns) else '<p>None.</p>'}"


def _samples(history: History) -> str:
    texts: dict[int, list[str]] = {}  # a step has one for each prompt
    for row in history.rows["event"]:
        if row.get("name") == "sample":
            texts.setdefault(row["step"], []).append(row.get("message", ""))
    if not texts:
        return ""
    steps = list(texts)
    note = ""
    if len(steps) > _SAMPLES:
        note = f"<p>{_SAMPLES} of {len(steps)}, evenly spread.</p>"
        steps = [steps[index * (len(steps) - 1) // (_SAMPLES - 1)] for index in range(_SAMPLES)]
    items = ""
    for step in steps:
        samples = "".join(f"<pre>{_text(text)}</pre>" for text in texts[step])
        is_open = ' open=""' if step == steps[-1] else ""
        items += f"<details{is_open}><summary>step {step:,}</summary>{samples}</details>"
    return f"<h2>Samples over time: {_text(history.label)}</h2>{note}{items}"


def _events(history: History) -> str:
    launches = [
        f"<li>{datetime.datetime.fromtimestamp(launch.time):%Y-%m-%d %H:%M:%S} on {_text(launch.host)}, "
        f"{f'resumed from step {launch.step:,}' if launch.step else 'from scratch'}</li>"
        for launch in history.launches
    ]
    text = f"<h2>Processes: {_text(history.label)}</h2><ol>{''.join(launches)}</ol>"
    warnings = [row for row in history.rows["event"] if row.get("level") in ("warning", "error")]
    if warnings:
        earlier = len(warnings) - _EVENTS
        items = [f"<li>and {earlier:,} before</li>"] if earlier > 0 else []
        items += [f"<li>step {row['step']:,}: {_text(row.get('message', ''))}</li>" for row in warnings[-_EVENTS:]]
        text += f"<h2>Warnings: {_text(history.label)}</h2><ul>{''.join(items)}</ul>"
    return text


def _last(rows: Sequence[Row], metric: str) -> str | None:
    """The last value of a metric, such as ``nan`` if it was not finite."""
    row = rows[-1] if rows else {}
    return str(row["nonfinite"][metric]) if metric in row.get("nonfinite", {}) else _number(row.get(metric))


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _text(value: Any) -> str:
    """Escaped text for XML, without the control characters that a model early in training writes."""
    text = str(value)
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text))
