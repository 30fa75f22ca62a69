"""``gpt-simple plugins new``: the folder of an installable plugin, from the templates in this package."""

from __future__ import annotations

import os
from pathlib import Path
from string import Template

from gpt_simple._files import AtomicDirectory, new_directory
from gpt_simple._names import DISTRIBUTION, PLUGIN_GROUP, PROGRAM, __version__
from gpt_simple.errors import ConfigError
from gpt_simple.plugin_host.discovery import installed, name_problem, usable

_SUFFIX = ".tmpl"

DESCRIPTIONS = {
    "logger": "Writes the metrics of a gpt-simple run to a file.",
    "component": "A learning-rate schedule for gpt-simple.",
}
"""The templates, and the description of a package that is made from each."""

_TAKEN = frozenset({DISTRIBUTION, "gpt-simple-lm"})
"""Packages that are not plugins: the trainer itself, and an unrelated one with the same import name."""


def scaffold(name: str, template: str, directory: str | Path) -> str:
    """Write the package and return its files and the next steps as text.

    ConfigError for a name that cannot be used, or a folder that exists.
    """
    if problem := name_problem(name):
        raise ConfigError(f"plugins new: {problem}: choose a name such as csvlog")
    distribution = f"gpt-simple-{name.replace('_', '-')}"
    if name.endswith("_") or distribution in _TAKEN:
        raise ConfigError(f"plugins new: {distribution} cannot be the name of its package: choose another name")
    if (taken := usable(installed()).get(name)) is not None and taken.distribution != distribution:
        whose = "a built-in plugin" if taken.origin == "builtin" else f"taken by {taken.distribution} {taken.version}"
        raise ConfigError(f"plugins new: {name!r} is {whose}: choose another name")
    folder = Path(directory) / distribution
    package = f"gpt_simple_{name}"
    values = {
        "name": name,
        "cls": "".join(part.capitalize() for part in name.split("_")),
        "package": package,
        "distribution": distribution,
        "description": DESCRIPTIONS[template],
        "group": PLUGIN_GROUP,
        "core": DISTRIBUTION,
        "core_version": __version__,
    }
    templates = Path(__file__).parents[1] / "templates"
    texts = {}
    for root in (templates / "common", templates / template):
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
    next_steps = f"""
next: pip install -e {folder}
      {PROGRAM} plugins show {name}
      {PROGRAM} run config.toml -p {name}"""
    return "\n".join([*(f"wrote {folder / file}" for file in sorted(texts)), next_steps])
