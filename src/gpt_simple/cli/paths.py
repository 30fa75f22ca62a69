"""The type of arguments and options that name a file or a directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from gpt_simple._files import user_path


class UserPath(click.Path):
    """A path in which a leading ``~`` is the home directory. Empty text is an error."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(user_path(os.fspath(value)), param, ctx)
        except ValueError as error:
            self.fail(str(error), param, ctx)


PATH = UserPath(path_type=Path)
