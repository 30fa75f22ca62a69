"""Write a configuration to start from, with every field explained."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from gpt_simple._files import write_whole
from gpt_simple._names import PROGRAM
from gpt_simple.cli.fields import builtin_configs
from gpt_simple.cli.paths import PATH
from gpt_simple.cli.terminal import echo
from gpt_simple.config import render
from gpt_simple.config.load import read
from gpt_simple.config.structure import structure
from gpt_simple.config.types import fields_of
from gpt_simple.errors import ConfigError
from gpt_simple.plugin_host.discovery import DEFAULT_ON


def _gpt2_shape(
    n_embd: int, n_layer: int, n_head: int, *, learning_rate: float, accumulation: int
) -> dict[str, dict[str, Any]]:
    """The keys to set first for training on own data."""
    return {
        "model": {"n_embd": n_embd, "n_layer": n_layer, "n_head": n_head},
        "data": {"path": "data", "max_length": 2048},
        "optimizer": {"learning_rate": learning_rate, "warmup_steps": 100},
        "training": {
            "per_device_batch_size": 4,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 1000,
            "gradient_checkpointing": "auto",
            "eval_steps": 500,
            "save_steps": 1000,
            "output_dir": "outputs",
        },
    }


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
            "gradient_checkpointing": "auto",
            "eval_steps": 200,
            "save_steps": 200,
            "output_dir": "outputs",
        },
    },
    "cpu": {
        "model": {"n_embd": 192, "n_layer": 4, "n_head": 4},
        "data": {"path": "data", "tokenizer_vocab_size": 2048, "max_length": 128},
        "optimizer": {"learning_rate": 2e-3, "warmup_steps": 100},
        "training": {
            "per_device_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "max_steps": 1500,
            "compile": False,
            "gradient_checkpointing": "auto",
            "logging_steps": 50,
            "eval_steps": 500,
            "max_eval_batches": 50,
            "save_steps": 500,
            "output_dir": "outputs",
        },
    },
    "small": _gpt2_shape(768, 12, 12, learning_rate=3e-4, accumulation=4),
    "medium": _gpt2_shape(1024, 24, 16, learning_rate=3e-4, accumulation=8),
    "large": _gpt2_shape(1280, 36, 20, learning_rate=2.5e-4, accumulation=16),
}


@click.command()
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), default="small", show_default=True, help="What to start from."
)
@click.option(
    "-o",
    "--output",
    type=PATH,
    default="config.toml",
    show_default=True,
    help="A .toml, .yaml or .json file; - prints.",
)
@click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
def init(preset: str, output: Path, force: bool) -> None:
    """Write a configuration to start from, with every field explained.

    tiny learns from generated stories on a CPU and needs no data. The others train on what data.path names: cpu on a
    few megabytes of text, within minutes on a CPU; small, medium and large have the shapes of GPT-2's sizes.
    """
    to_terminal = output == Path("-")
    path = Path("config.toml") if to_terminal else output
    text = write(preset, path)
    if to_terminal:
        echo(text, nl=False)
        return
    if not force and os.path.lexists(path):
        raise ConfigError(f"{path} exists already", hint="choose another name with -o, or --force to overwrite it")
    try:
        write_whole(path, text)
    except OSError as error:
        raise ConfigError(f"{path}: the file cannot be written ({error.strerror})") from None
    echo(f"{path} written; look it over, then: {PROGRAM} run {path}")


def write(preset: str, path: Path) -> str:
    """The text of a preset in the format of the path's suffix: its own keys, and all others as comments."""
    raw = read(None, environ={}, sections=PRESETS[preset])
    # The plugins that every run has, if they have anything to configure.
    plugins = {name: cls for name, cls in builtin_configs().items() if name in DEFAULT_ON and fields_of(cls)}
    config = structure(raw, plugin_configs=plugins)
    match path.suffix.lower():
        case ".toml":
            body = render.to_toml(config, chosen=raw.origins)
        case ".yaml" | ".yml":
            body = render.to_yaml(config, chosen=raw.origins)
        case ".json":
            return json.dumps(PRESETS[preset], indent=2) + "\n"
        case _:
            raise ConfigError(f"{path}: a configuration is a .toml, .yaml, .yml or .json file")
    return f"""\
# The {preset} preset of `{PROGRAM} init`. What is commented out is the default.
# Train: {PROGRAM} run {path.name}

{body}"""
