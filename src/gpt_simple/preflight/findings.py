"""Findings for people and for machines, and the exit code they amount to."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterable, Sequence

from attrs import asdict

from gpt_simple.config.mistakes import printable
from gpt_simple.errors import ExitCode, GptSimpleError
from gpt_simple.hooks.results import Finding

SCHEMA = 1
"""Version of the JSON output; raised when a key changes its meaning or goes away."""

_RANK = {"error": 0, "warning": 1, "info": 2}
_MARK = {"error": "error", "warning": "warn", "info": "ok"}


def from_error(error: GptSimpleError) -> list[Finding]:
    """One finding for each problem of an error, with the name of its exit code as code."""
    kind = next((code for code in ExitCode if code == error.exit_code), ExitCode.FAILURE)
    return Finding.of_error(error, kind.name.lower())


def exit_code(findings: Iterable[Finding], *, strict: bool = False) -> int:
    """0 without errors (``strict``: without warnings), else the code of the worst class."""
    counted = ("error", "warning") if strict else ("error",)
    return max((finding.exit_code for finding in findings if finding.severity in counted), default=0)


def to_json(findings: Sequence[Finding], code: int) -> str:
    """One object: schema, exit_code and the findings with all their fields."""
    items = [asdict(finding) | ({"exit_code": 0} if finding.severity == "info" else {}) for finding in findings]
    document = {"schema": SCHEMA, "exit_code": code, "findings": items}
    return json.dumps(document, indent=2, default=str)


def to_table(findings: Sequence[Finding], *, width: int | None = None) -> str:
    """A line or more for each finding: errors first, then warnings, then the rest."""
    width = width or max(60, shutil.get_terminal_size((110, 24)).columns)
    column = max((len(finding.code) for finding in findings), default=0)
    lines: list[str] = []
    for finding in sorted(findings, key=lambda finding: _RANK[finding.severity]):
        head = f"{_MARK[finding.severity]:<6} {finding.code:<{column}}  "
        shown = finding.problem if finding.severity != "info" else finding.problem._replace(location=None)
        text = printable(str(shown))
        body = [part for line in text.splitlines() for part in textwrap.wrap(line, width - len(head)) or [""]]
        lines += [(head if number == 0 else " " * len(head)) + part for number, part in enumerate(body)]
    counts = {kind: sum(finding.severity == kind for finding in findings) for kind in _RANK}
    return "\n".join([*lines, f"{_count(counts['error'], 'error')}, {_count(counts['warning'], 'warning')}"])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
