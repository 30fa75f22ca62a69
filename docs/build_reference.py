"""Write the field reference in configuration.md from the schema: `python docs/build_reference.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs

from gpt_simple.cli.fields import builtin_configs
from gpt_simple.config.frozen import json_value
from gpt_simple.config.render import value_text
from gpt_simple.config.schema import Phase, PluginsConfig, WarmupStage
from gpt_simple.config.structure import SECTIONS
from gpt_simple.config.types import fields_of, summary

PAGE = Path(__file__).with_name("configuration.md")
START = "<!-- The rest of this page is written by docs/build_reference.py. -->\n"


def reference() -> str:
    """A table of fields for every section and built-in plugin, as Markdown."""
    plugins = {f"plugins.{name}": cls for name, cls in builtin_configs().items()}
    plugins = {name: cls for name, cls in plugins.items() if fields_of(cls)}
    items = {"data.curriculum[]": Phase, "training.warmup_stages[]": WarmupStage}
    tables = {**SECTIONS, **items, "plugins": PluginsConfig, **plugins}
    return "\n".join(line for name, cls in tables.items() for line in _section(name, cls))


def page() -> str:
    """The page with a new reference."""
    return PAGE.read_text(encoding="utf-8").partition(START)[0] + START + "\n" + reference()


def _section(name: str, cls: type) -> Iterator[str]:
    yield f"## `[{name}]`"
    yield ""
    if about := summary(cls).removeprefix(f"[{name}]").strip(" :."):
        yield f"{about[0].upper()}{about[1:]}."
        yield ""
    yield "| key | type | default | |"
    yield "|---|---|---|---|"
    for spec in fields_of(cls):
        default = "" if spec.default is attrs.NOTHING else f"`{value_text(json_value(spec.default))}`"
        kind = spec.type.label.replace("|", "\\|")
        yield f"| `{spec.name}` | {kind} | {default} | {spec.doc.replace('|', chr(92) + '|')} |"
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
