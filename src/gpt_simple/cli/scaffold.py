"""``gpt-simple plugins new``: the folder of an installable plugin, from the templates in this package."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from string import Template

from gpt_simple._names import DISTRIBUTION, PLUGIN_GROUP, PROGRAM, __version__
from gpt_simple.errors import ConfigError
from gpt_simple.plugin_host.discovery import installed, name_problem, usable

SUFFIX = ".tmpl"

TAKEN = frozenset({DISTRIBUTION, "gpt-simple-lm"})
"""Packages that are no plugins: the trainer itself, and somebody else's that owns the same import."""


def scaffold(name: str, template: str, directory: str) -> list[str]:
    """Write the package and return what to say about it. ConfigError for a name that cannot be used.

    Nothing is written into a folder that exists.
    """
    if problem := name_problem(name):
        raise ConfigError(f"plugins new: {problem}: choose a name such as csvlog")
    distribution = f"gpt-simple-{name.replace('_', '-')}"
    if name.endswith("_") or distribution in TAKEN:
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
        "group": PLUGIN_GROUP,
        "core": DISTRIBUTION,
        "core_version": __version__,
    }
    texts = {
        folder / Path(*path.parts).with_name(path.name.removesuffix(SUFFIX)): Template(text).substitute(values)
        for path, text in _templates(template, package)
    }
    try:
        folder.mkdir(parents=True)
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except FileExistsError:
        raise ConfigError(f"plugins new: {folder} exists already: remove it or choose another name") from None
    except OSError as error:
        raise ConfigError(f"plugins new: {folder} cannot be written: {error.strerror}") from None
    return [
        *(f"wrote {path}" for path in texts),
        "",
        f"next: pip install -e {folder}",
        f"      {PROGRAM} plugins show {name}",
        f"      {PROGRAM} run config.toml -p {name}",
    ]


def _templates(template: str, package: str) -> Iterator[tuple[PurePosixPath, str]]:
    """Relative paths with the package's own name in them, and texts."""
    for path, file in _walk(files("gpt_simple") / "templates" / template, PurePosixPath()):
        # Test files too: tests of two packages that are run together must not have one name.
        parts = [part.replace("package", package) for part in path.parts]
        yield PurePosixPath(*parts), file.read_text(encoding="utf-8")


def _walk(folder: Traversable, path: PurePosixPath) -> Iterator[tuple[PurePosixPath, Traversable]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _walk(entry, path / entry.name)
        elif entry.name.endswith(SUFFIX):
            yield path / entry.name, entry
