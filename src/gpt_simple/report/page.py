"""The page: facts, charts over three axes, configuration, samples and events. It needs no script.

It is well-formed XML as well as HTML, so that a parser can hold it to account.
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
from gpt_simple.report.history import AXES, History

_SAMPLES = 12
_EVENTS = 50


def page(histories: Sequence[History]) -> str:
    """The report about these runs, as one HTML document."""
    names = ", ".join(history.label for history in histories)
    radios = "".join(
        f'<input type="radio" name="axis" id="axis-{axis}"{" checked=" + chr(34) * 2 if axis == "step" else ""}/>'
        for axis in AXES
    )
    labels = "".join(f'<label for="axis-{axis}">{AXIS_NAMES[axis]}</label>' for axis in AXES)
    body = [
        _runs(histories),
        f'<nav aria-label="horizontal axis">over {labels}</nav>',
        _legend(histories),
        f'<div class="charts">{"".join(figures(histories))}</div>',
        _configuration(histories),
        *(_samples(history) for history in histories),
        *(_events(history) for history in histories),
    ]
    style = files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        '<meta name="color-scheme" content="light dark"/>'
        f"<title>{_text(names)}</title><style>{style}</style></head>\n"
        f"<body>{radios}<main><h1>{_text(names)}</h1>\n{chr(10).join(part for part in body if part)}\n"
        f"<footer>{PROGRAM} {__version__}, {datetime.datetime.now():%Y-%m-%d %H:%M}</footer></main></body></html>\n"
    )


def _runs(histories: Sequence[History]) -> str:
    facts = [_facts(history) for history in histories]
    names = list(dict.fromkeys(name for values in facts for name in values))
    head = "".join(f"<th>{_text(history.label)}</th>" for history in histories)
    rows = "".join(
        f"<tr><th>{name}</th>" + "".join(f"<td>{_text(values.get(name, '-'))}</td>" for values in facts) + "</tr>"
        for name in names
    )
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _facts(history: History) -> dict[str, str]:
    """What one looks at first: from the rows of all processes, but for what only the last one's summary tells."""
    facts, status = history.facts, history.status
    # Of a run that goes on or was lost it is an earlier process's.
    summary = history.summary if status.state in ("completed", "stopped") else {}
    train = history.rows["train"][-1] if history.rows["train"] else {}
    evals = history.values("eval/loss")
    best = min(evals) if evals else None
    bits, rates, memory = map(history.values, ("eval/bits_per_byte", "perf/tokens_per_second", "memory/peak_gib"))
    values = {
        "status": status.state + (f": {status.reason}" if status.reason else ""),
        "steps": f"{status.step:,}" + (f" of {status.max_steps:,}" if status.max_steps else ""),
        "tokens": si(train["tokens"]) if train else None,
        "training loss": _number(train.get("train/loss")),
        "validation loss": _number(evals[-1] if evals else None),
        "best validation loss": _number(best),
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
    kinds = (
        "<li><i>thin</i> training</li><li><i>dotted line with points</i> validation</li><li><i>long dashes</i> floor"
        "</li><li><i>upright</i> resumed</li><li><i>tick</i> skipped steps</li>"
    )
    return f'<ul class="legend">{runs}{kinds}</ul>'


def _configuration(histories: Sequence[History]) -> str:
    keys = list(dict.fromkeys(key for history in histories for key in history.config))
    if len(histories) > 1:
        title = "Differences of configuration"
        keys = [key for key in keys if len({str(history.config.get(key)) for history in histories}) > 1]
    else:
        title = "Configuration: what was chosen"
        keys = [key for key in keys if histories[0].origins.get(key, "default") != "default"]
    if not keys:
        return f"<h2>{title}</h2><p>None.</p>"
    head = "".join(f"<th>{_text(history.label)}</th>" for history in histories)
    rows = "".join(
        f"<tr><th>{_text(key)}</th>"
        + "".join(f"<td>{_text(history.config.get(key, '-'))}</td>" for history in histories)
        + "</tr>"
        for key in keys
    )
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<h2>{title}</h2><div class="scroll">{table}</div>'


def _samples(history: History) -> str:
    found = history.events("sample")
    if not found:
        return ""
    picked = (
        found if len(found) <= _SAMPLES else [found[i * (len(found) - 1) // (_SAMPLES - 1)] for i in range(_SAMPLES)]
    )
    items = "".join(
        f"<details{' open=' + chr(34) * 2 if row is picked[-1] else ''}><summary>step {row['step']:,}</summary>"
        f"<pre>{_text(row['message'])}</pre></details>"
        for row in picked
    )
    note = f"<p>{len(picked)} of {len(found)}, evenly spread.</p>" if len(picked) < len(found) else ""
    return f"<h2>Samples over time: {_text(history.label)}</h2>{note}{items}"


def _events(history: History) -> str:
    launches = [
        f"<li>{datetime.datetime.fromtimestamp(launch.time):%Y-%m-%d %H:%M:%S} on {_text(launch.host)}, "
        f"{f'resumed from step {launch.step:,}' if launch.step else 'from scratch'}</li>"
        for launch in history.launches
    ]
    warnings = history.warnings()
    told = [f"<li>step {row['step']:,}: {_text(row['message'])}</li>" for row in warnings[-_EVENTS:]]
    more = f"<li>and {len(warnings) - _EVENTS:,} before</li>" if len(warnings) > _EVENTS else ""
    parts = [f"<h2>Processes: {_text(history.label)}</h2><ol>{''.join(launches)}</ol>"]
    if told:
        parts.append(f"<h2>Warnings: {_text(history.label)}</h2><ul>{more}{''.join(told)}</ul>")
    return "".join(parts)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _text(value: Any) -> str:
    """Text as it may stand in XML: escaped, and without the control characters that a young model writes."""
    text = str(value)
    return escape("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text))
