"""``gpt-simple plugins new``: the folder of an installable plugin, from the templates in this package."""

from __future__ import annotations

import os
from pathlib import Path
from string import Template

from attrs import frozen

from gpt_simple._files import AtomicDirectory, new_directory
from gpt_simple._names import COMMAND_GROUP, DISTRIBUTION, PLUGIN_GROUP, PROGRAM, __version__
from gpt_simple.errors import ConfigError
from gpt_simple.plugin_host.discovery import commands, installed, name_problem, own_commands, usable

_SUFFIX = ".tmpl"


@frozen
class Kind:
    """What a kind of package is for, and its part of the README.

    ``suffix`` is that of the class that the entry point names. ``section`` is the table of the configuration with its
    line; the name of the plugin is ``$name`` in all of them.
    """

    description: str
    section: str = ""
    suffix: str = ""
    arguments: str = ""


KINDS = {
    "logger": Kind("Writes the metrics of a gpt-simple run to a file.", '[plugins.$name]\npath = "$name.csv"\n'),
    "model": Kind(
        "A model for gpt-simple.",
        '[model]\nname = "$name"\nwidth = 64\n\n[plugins.$name]\n',
        suffix="Plugin",
        arguments=" --model.name $name",
    ),
    "optimizer": Kind(
        "An optimizer for gpt-simple.",
        '[optimizer]\nname = "$name"\nlearning_rate = 1e-4\n\n[plugins.$name]\n',
        suffix="Plugin",
        arguments=" --optimizer.name $name",
    ),
    "schedule": Kind(
        "A learning-rate schedule for gpt-simple.",
        '[optimizer]\nschedule = "$name"\n\n[plugins.$name]\n',
        arguments=" --optimizer.schedule $name",
    ),
    "source": Kind(
        "A data source for gpt-simple: the rows of an SQLite database.",
        '[data]\nsource = "$name"\ndatabase = "documents.db"\n\n[plugins.$name]\n',
        suffix="Plugin",
        arguments=" --data.source $name --data.database documents.db",
    ),
    "evaluation": Kind("An evaluation for gpt-simple.", "[plugins.$name]\nmax_batches = 8\n"),
    "command": Kind("A command for gpt-simple."),
}
"""The kinds of packages. Each has a folder of templates."""

_TAKEN = frozenset({DISTRIBUTION, "gpt-simple-lm"})
"""Packages that are not plugins: the trainer itself, and an unrelated one with the same import name."""


def scaffold(name: str, kind: str, directory: str | Path) -> str:
    """Write the package and return its files and the next steps as text.

    ConfigError for a name that cannot be used, or a folder that exists.
    """
    if problem := name_problem(name):
        raise ConfigError(f"plugins new: {problem}: choose a name such as csvlog")
    distribution = f"gpt-simple-{name.replace('_', '-')}"
    if name.endswith("_") or distribution in _TAKEN:
        raise ConfigError(f"plugins new: {distribution} cannot be the name of its package: choose another name")
    is_command = kind == "command"
    records = usable(commands()) | own_commands() if is_command else usable(installed())
    if (taken := records.get(name)) is not None and taken.distribution != distribution:
        whose = (
            f"a built-in {'command' if is_command else 'plugin'}"
            if taken.origin == "builtin"
            else f"taken by {taken.distribution} {taken.version}"
        )
        raise ConfigError(f"plugins new: {name!r} is {whose}: choose another name")
    folder = Path(directory) / distribution
    package = f"gpt_simple_{name}"
    chosen = KINDS[kind]
    cls = "".join(part.capitalize() for part in name.split("_"))
    if is_command:
        steps = [f"{PROGRAM} {name} --help"]
    else:
        arguments = Template(chosen.arguments).substitute(name=name)
        steps = [f"{PROGRAM} plugins show {name}", f"{PROGRAM} run config.toml -p {name}{arguments}"]
    section = Template(chosen.section).substitute(name=name)
    values = {
        "name": name,
        "cls": cls,
        "target": "main" if is_command else f"{cls}{chosen.suffix}",
        "package": package,
        "distribution": distribution,
        "description": chosen.description,
        "group": COMMAND_GROUP if is_command else PLUGIN_GROUP,
        "core": DISTRIBUTION,
        "core_version": __version__,
        "try": "\n".join(steps),
        "table": f"\nOr in the configuration:\n\n```toml\n{section}```\n" if section else "",
    }
    templates = Path(__file__).parents[1] / "templates"
    texts = {}
    for root in (templates / "common", templates / kind):
        for path in root.rglob(f"*{_SUFFIX}"):
            # Test files too: tests of two packages that are run together must not have one name.
            file = str(path.relative_to(root)).removesuffix(_SUFFIX).replace("package", package)
            texts[file] = Template(path.read_text(encoding="utf-8")).substitute(values)
    if os.path.lexists(folder):
        raise ConfigError(f"plugins new: {folder} exists already: remove it or choose another name")
    try:
        with new_directory(folder.parent), AtomicDirectory(folder.with_name(f".{distribution}.{os.getpid()}")) as new:
            for file, text in texts.items():
                (new.path / file).parent.mkdir(parents=True, exist_ok=True)
                (new.path / file).write_text(text, encoding="utf-8")
            new.rename(folder)
    except OSError as error:
        raise ConfigError(f"plugins new: {folder} cannot be written: {error.strerror}") from None
    following = "\n      ".join([f"pip install -e {folder}", *steps])
    return "\n".join([*(f"wrote {folder / file}" for file in sorted(texts)), "", f"next: {following}"])
