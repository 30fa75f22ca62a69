"""``gpt-simple init``: a configuration to start from, with every field explained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from gpt_simple._names import PROGRAM
from gpt_simple.config.load import read
from gpt_simple.config.schema import Config
from gpt_simple.config.structure import structure
from gpt_simple.errors import ConfigError

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "tiny": {
        "model": {"n_embd": 128, "n_layer": 4, "n_head": 4},
        "data": {"source": "stories", "tokenizer_vocab_size": 1024, "max_length": 128},
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 50},
        "training": {
            "per_device_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "max_steps": 600,
            "compile": False,
            "gradient_checkpointing": False,
            "eval_steps": 200,
            "save_steps": 200,
        },
    },
    "small": {"data": {"path": "data"}},
    "medium": {
        "model": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
        "data": {"path": "data"},
        "training": {"gradient_accumulation_steps": 8},
    },
    "large": {
        "model": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
        "data": {"path": "data"},
        "optimizer": {"learning_rate": 2.5e-4},
        "training": {"gradient_accumulation_steps": 16},
    },
}


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), default="small", show_default=True, help="What to start from."
)
@click.option(
    "-o", "--output", default="config.toml", show_default=True, help="A .toml, .yaml or .json file; - prints."
)
@click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
def init(preset: str, output: str, force: bool) -> None:
    """Write a configuration to start from, with every field explained.

    tiny learns from generated stories on a CPU and needs no data; small, medium and large have the shapes of
    GPT-2's sizes and train on what data.path names.
    """
    path = Path("config.toml" if output == "-" else output)
    text = write(preset, path)
    if output == "-":
        click.echo(text, nl=False)
        return
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} exists already; choose another name with -o, or --force to overwrite it") from None
    except OSError as error:
        raise ConfigError(f"{path}: the file cannot be written ({error.strerror})") from None
    click.echo(f"{path} written; look it over, then: {PROGRAM} run {path}")


def preset_config(preset: str) -> Config:
    """A preset with the tables of the built-in plugins that are on by default."""
    from gpt_simple.hooks.host import PluginHost

    host = PluginHost.activate({}, set_keys=lambda key: False)
    return structure(read(None, environ={}, sections=PRESETS[preset]), plugin_configs=host.config_classes())


def write(preset: str, path: Path) -> str:
    """The text of a preset in the format of the path's suffix."""
    from gpt_simple.config import render

    match path.suffix.lower():
        case ".toml":
            body = render.to_toml(preset_config(preset))
        case ".yaml" | ".yml":
            body = render.to_yaml(preset_config(preset))
        case ".json":
            return render.to_json(preset_config(preset))
        case _:
            raise ConfigError(f"{path}: a configuration is a .toml, .yaml, .yml or .json file")
    header = f"# The {preset} preset of `{PROGRAM} init`, all fields with their values. Leave out what you do not need."
    return f"{header}\n# Train: {PROGRAM} run {path.name}\n\n{body}"
