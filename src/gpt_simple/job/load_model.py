"""A trained model back from the directory of its run, for whatever comes after training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from attrs import frozen

from gpt_simple._names import DISTRIBUTION
from gpt_simple.checkpoint.state import load_model
from gpt_simple.checkpoint.store import Checkpoint, Store
from gpt_simple.data.tokenizer import load_tokenizer
from gpt_simple.engine.compatibility import keep_values
from gpt_simple.errors import CheckpointError, ConfigError, raise_all
from gpt_simple.hooks.components import UnknownComponent
from gpt_simple.model.shape import padded
from gpt_simple.plugin_host.activation import Switches
from gpt_simple.plugin_host.discovery import installed, usable
from gpt_simple.run_dir.layout import RunDir
from gpt_simple.spec import try_resolve

if TYPE_CHECKING:
    from gpt_simple.hooks.batch import Tokenizer


@frozen
class Restored:
    """A model in eval mode, fp32, with the tokenizer that it was trained with."""

    model: torch.nn.Module
    tokenizer: Tokenizer
    checkpoint: Checkpoint


def restore(run_dir: RunDir, device: torch.device, *, step: int | None = None, plugins: Sequence[str] = ()) -> Restored:
    """The model of the checkpoint of ``step``, or of the newest one that is whole. Changes nothing on disk.

    ``plugins`` are switched on as by ``-p``, beside those of the run that are installed: a file is never run because
    of what a run.json says. Raises CheckpointError if there is no such run or checkpoint, and ConfigError if what
    brought its model is not here.
    """
    checkpoint = _find(Store(run_dir.checkpoints), run_dir, step)
    facts = _facts(run_dir)
    values, tokenizer = facts["config"], load_tokenizer(run_dir.tokenizer)
    sections = {"model": _section(values, "model"), "data": {"max_length": values["data.max_length"]}}
    switches = Switches.parse((*_installed(facts["plugins"]), *plugins))
    spec, errors = try_resolve(None, sections=sections, switches=switches)
    gone = [f"{name} ({origin})" for name, origin in facts["plugins"].items() if name not in usable(installed())]
    if gone and any(isinstance(error, UnknownComponent) for error in errors):
        raise ConfigError(
            f"nothing here brings its model {values['model.name']!r}",
            location=str(run_dir.root),
            hint=f"of the run's plugins are missing {', '.join(gone)}: install what brings the model, or name its file"
            " with -p ./FILE.py",
        )
    raise_all(errors)
    assert spec is not None, "without errors there is one"
    config = keep_values(spec, {key: value for key, value in values.items() if key.startswith("model.")}).config
    rows = getattr(config.model, "vocab_size", None) or padded(tokenizer.vocab_size)
    part = spec.registry.get("model", config.model.name)
    model: torch.nn.Module = part.build(config.model, vocab_size=rows, max_length=config.data.max_length)
    load_model(model, Store(run_dir.checkpoints).load_tensors(checkpoint, "model"))
    return Restored(model.to(device).eval(), tokenizer, checkpoint)


def _find(store: Store, run_dir: RunDir, step: int | None) -> Checkpoint:
    if step is None:
        newest, skipped = store.newest_valid()
        if newest is None:
            reasons = "".join(f"\n  {path}: {reason}" for path, reason in skipped)
            raise CheckpointError(f"there is no checkpoint in {run_dir.checkpoints} to take the model from{reasons}")
        return newest
    steps = {checkpoint.step: checkpoint for checkpoint in store.list()}
    if step not in steps:
        kept = ", ".join(map(str, sorted(steps))) or "none"
        raise CheckpointError(
            f"{run_dir.checkpoints} has no checkpoint of step {step}", hint=f"expected one of: {kept}"
        )
    return steps[step]


def _facts(run_dir: RunDir) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(run_dir.run_json.read_text(encoding="utf-8"))["facts"]
        return facts
    except FileNotFoundError:
        raise CheckpointError(f"{run_dir.run_json} is missing: it says which model the checkpoint is of") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{run_dir.run_json} is damaged ({error}): it says which model this is") from error


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    start = f"{name}."
    return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}


def _installed(plugins: Mapping[str, str]) -> tuple[str, ...]:
    """Plugins of other packages that the run had and that are here: one of them may have brought the model."""
    here = usable(installed())
    return tuple(name for name, origin in plugins.items() if name in here and not origin.startswith(DISTRIBUTION))
