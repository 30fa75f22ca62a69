"""Write plugins/hooks.md from the catalogue of hooks: `python docs/build_hook_reference.py`."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path

import attrs

from gpt_simple.hooks import HOOKS, HookInfo
from gpt_simple.hooks.specs import HookSpecs

PAGE = Path(__file__).with_name("plugins") / "hooks.md"

HEAD = """# Hooks

This page lists all hooks, in the order in which a run first calls them. `docs/build_hook_reference.py` generates it
from `gpt_simple/hooks/specs.py`, which is the contract. [policy.md](policy.md) describes the rules.

A hook named `on_*` is a notification and returns nothing. Any other name is a verb, and its result is used. An
implementation may take [fewer arguments](policy.md#arguments-of-a-hook) than its hook has. All examples are methods of
a plugin class:

```python
import time
from gpt_simple import Finding, Metric, Plugin, hookimpl
```
"""

RANKS = {
    "all": "every process",
    "main": "the main process",
    "plugin": "the plugin's `ranks`: the main process, or all of them",
}


def page() -> str:
    """The whole page."""
    return HEAD + "\n" + _table() + "".join("\n" + "\n".join(_section(info)) + "\n" for info in HOOKS.values())


def _table() -> str:
    rows = ["| hook | event | processes | returns |", "|---|---|---|---|"]
    for info in HOOKS.values():
        event = f"`{info.event.__name__}`" if info.event else f"`{', '.join(info.arguments)}`"
        returns = "" if info.returns == "none" else info.returns
        rows.append(f"| [`{info.name}`](#{info.name}) | {event} | {info.ranks} | {returns} |")
    return "\n".join(rows) + "\n"


def _section(info: HookInfo) -> Iterator[str]:
    text, _, example = (inspect.getdoc(getattr(HookSpecs, info.name)) or "").partition("::\n")
    summary, _, prose = text.removesuffix("Example").strip().replace("``", "`").partition("\n\n")
    order = ", in reverse order" if info.order == "reverse" else ""
    yield f"## {info.name}"
    yield ""
    yield summary
    yield ""
    yield f"Called on {RANKS[info.ranks]}{order}."
    yield ""
    if info.event is not None:
        about = (inspect.getdoc(info.event) or "").replace("``", "`")
        yield f"`{info.event.__name__}`: {about}"
        yield ""
        yield from (f"- `{name}`: `{kind}`{about}" for name, kind, about in _members(info.event))
        yield ""
    if prose:
        yield f"{prose}:"
        yield ""
    yield "```python"
    yield textwrap.dedent(example).strip("\n")
    yield "```"


def _members(event: type) -> Iterator[tuple[str, str, str]]:
    """Name and type of each field, and of each property what it is."""
    for field in attrs.fields(event):
        computed = getattr(event, field.alias, None)
        if isinstance(computed, property):
            about = " ".join((inspect.getdoc(computed) or "").replace("``", "`").split())
            yield field.alias, inspect.signature(computed.fget).return_annotation, f". {about}"
        else:
            yield field.name, field.type, ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
