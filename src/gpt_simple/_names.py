"""The public names of the project (distribution, script, entry points, variables), each written once."""

__version__ = "0.1.0"

DISTRIBUTION = "gpt-simple-trainer"
"""The distribution that pip installs."""

PROGRAM = "gpt-simple"
"""The script."""

PLUGIN_GROUP = "gpt_simple.plugins"
"""Entry-point group: name -> Plugin class."""

COMMAND_GROUP = "gpt_simple.commands"
"""Entry-point group: name -> click command."""

ENV_PREFIX = "GPT_SIMPLE__"
"""``GPT_SIMPLE__TRAINING__MAX_STEPS=10`` overrides ``training.max_steps``."""


def install_hint(extra: str | None = None) -> str:
    """The command that installs this distribution, with an extra if one is named."""
    target = DISTRIBUTION if extra is None else f"{DISTRIBUTION}[{extra}]"
    return f'pip install "{target}"'
