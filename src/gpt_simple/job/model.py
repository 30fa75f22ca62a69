"""The model of a run: a new one as configured, or the trained one from the directory of the run."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from gpt_simple._documents import check, read
from gpt_simple._names import DISTRIBUTION
from gpt_simple.checkpoint.sharded import is_sharded
from gpt_simple.checkpoint.state import load_model
from gpt_simple.checkpoint.store import Checkpoint, Store, weights_stem
from gpt_simple.data.dataset import Dataset
from gpt_simple.data.tokenizer import load_tokenizer
from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.engine.activation_checkpointing import KEY, ActivationCheckpointing
from gpt_simple.engine.compatibility import keep_values
from gpt_simple.engine.components import guarded
from gpt_simple.engine.resume import check_weights
from gpt_simple.engine.weights import paired
from gpt_simple.errors import CheckpointError, ConfigError, PluginError, did_you_mean, raise_all
from gpt_simple.hooks.components import UnknownComponent
from gpt_simple.hooks.plugin import EVAL, LIVE
from gpt_simple.model.shape import padded
from gpt_simple.plugin_host.activation import Switches
from gpt_simple.plugin_host.discovery import installed, usable
from gpt_simple.run_dir.layout import RunDir, no_run
from gpt_simple.spec import RunSpec, try_resolve

if TYPE_CHECKING:
    from gpt_simple.hooks.batch import Tokenizer


_INFO = {"facts": {"config": {"model.name": str, "data.max_length": int}, "plugins": {...: str}}}


def new_model(spec: RunSpec, tokenizer: Tokenizer) -> torch.nn.Module:
    """The configured model on torch's default device. ConfigError if its vocabulary is too small for the tokenizer."""
    config = spec.config
    vocab_size = getattr(config.model, "vocab_size", None)
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than {vocab_size}",
            key="model.vocab_size",
            hint="leave it out or raise it",
        )
    part = spec.registry.get("model", config.model.name)
    model: torch.nn.Module = part.build(
        config.model, vocab_size=vocab_size or padded(tokenizer.vocab_size), max_length=config.data.max_length
    )
    return model


def refuse_shared_documents(spec: RunSpec, model: torch.nn.Module) -> None:
    """Raise ConfigError if ``data.document_mask`` is set and ``model`` cannot keep documents apart."""
    if not spec.config.data.document_mask:
        return
    try:
        inspect.signature(model.forward).bind("input_ids", "labels", "position_ids", "document_ids")
    except TypeError:
        raise ConfigError(
            f"the model {spec.config.model.name!r} takes no position_ids and document_ids, so its documents see each"
            " other",
            key="data.document_mask",
            hint="set it to false",
        ) from None


def refuse_weights(spec: RunSpec, data: Dataset, model: torch.nn.Module) -> None:
    """Raise ConfigError if the source gives weights, which ``model`` does not take for its own loss."""
    if data.weights is None or spec.config.training.loss != "standard":
        return
    if "weights" not in inspect.signature(model.forward).parameters:
        raise ConfigError(
            f"the source gives weights of targets, and the forward of the model {spec.config.model.name!r} has no"
            ' parameter "weights"',
            key="data.source",
            hint="choose another source, model or training.loss",
        )


def refuse_unshardable(spec: RunSpec, model: torch.nn.Module) -> None:
    """Raise ConfigError if ``model`` cannot be sharded over processes."""
    needed = {
        "init_weights()": callable(getattr(model, "init_weights", None)),
        "blocks (a ModuleList)": isinstance(getattr(model, "blocks", None), torch.nn.ModuleList),
    }
    if missing := [name for name, is_there in needed.items() if not is_there]:
        raise ConfigError(
            f"the model {spec.config.model.name!r} has no {' and no '.join(missing)}, by which it would be sharded",
            key="training.parallel",
            hint='use "ddp" or another model',
        )


def refuse_unsharded(dist: ProcessGroup, model: torch.nn.Module) -> None:
    """Raise PluginError if a sharded model has parameters that no process would reduce the gradients of."""
    if dist.shards and (names := [name for name, each in model.named_parameters() if not is_sharded(each)]):
        raise PluginError(
            f"a plugin has given the model the parameters {', '.join(names[:3])} after it was sharded over processes",
            hint='with training.parallel = "fsdp" parameters can be frozen and changed, and none is added or replaced',
        )


def checkpoint_activations(spec: RunSpec, model: torch.nn.Module, checkpointing: ActivationCheckpointing) -> None:
    """Apply ``checkpointing``. ConfigError if it was set, to other than "auto", and the model has none."""
    apply = getattr(guarded(spec.registry, spec.config, model), "set_activation_checkpointing", None)
    if apply is not None:
        apply(int(checkpointing.setting))
    elif spec.config.training.gradient_checkpointing not in (False, "auto") and not spec.origins.is_default(KEY):
        raise ConfigError(
            f"the model {spec.config.model.name!r} has no set_activation_checkpointing(every)",
            key=KEY,
            hint="set it to false",
        )


def restore(
    run_dir: RunDir,
    device: torch.device,
    *,
    step: int | None = None,
    weights: str | None = None,
    plugins: Sequence[str] = (),
) -> tuple[torch.nn.Module, Tokenizer]:
    """The model (fp32, in eval mode) of the checkpoint of ``step`` or of the newest valid one, and its tokenizer.

    ``weights`` names a set that a plugin of the run keeps, or ``live``. Without it the model has the weights that the
    run's evaluations had: the optimizer's own for evaluation (``eval``), where there are such. Changes nothing on disk.
    ``plugins`` are switched on as by ``-p``, beside those of the run that are installed. A plugin file runs only if it
    is among them, not because run.json names it. Raises CheckpointError if there is no such run, checkpoint or set, and
    ConfigError if the plugin that brings its model is missing.
    """
    if not run_dir.is_used():
        raise no_run(run_dir.root)
    store = Store(run_dir.checkpoints)
    checkpoint = _find(store, step)
    if weights is not None:
        _refuse_unknown(weights, store, checkpoint)
    info = _read_info(run_dir)
    values, tokenizer = info["config"], load_tokenizer(run_dir.tokenizer, end=_eod_id(info))
    saved = {key: value for key, value in values.items() if key.startswith("model.")}
    sections = {
        "model": {key.removeprefix("model."): value for key, value in saved.items()},
        "data": {"max_length": values["data.max_length"]},
    }
    here = usable(installed())
    # One of the external plugins may bring the model; the built-in ones do not.
    external = [name for name, origin in info["plugins"].items() if not origin.startswith(DISTRIBUTION)]
    switches = Switches.parse((*(name for name in external if name in here), *plugins))
    spec, errors = try_resolve(None, sections=sections, switches=switches)
    gone = [f"{name} ({origin})" for name, origin in info["plugins"].items() if name not in here]
    if gone and any(isinstance(error, UnknownComponent) for error in errors):
        raise ConfigError(
            f"nothing here brings its model {values['model.name']!r}",
            location=str(run_dir.root),
            hint=f"of the run's plugins are missing {', '.join(gone)}: install what brings the model, or name its file"
            " with -p ./FILE.py",
        )
    raise_all(errors)
    assert spec is not None, "without errors there is one"
    spec = keep_values(spec, saved)
    model = new_model(spec, tokenizer)
    calls = guarded(spec.registry, spec.config, model)
    load_model(calls, store.load_tensors(checkpoint, "model"))
    if weights is None and EVAL in store.weight_sets(checkpoint):
        weights = EVAL
    if weights not in (None, LIVE):
        _load_set(model, store, checkpoint, weights)
    calls.to(device)
    calls.eval()
    return model, tokenizer


def _find(store: Store, step: int | None) -> Checkpoint:
    if step is None:
        newest, skipped = store.newest_valid(lambda found: _check(store, found))
        if newest is None:
            reasons = "".join(f"\n  {path}: {reason}" for path, reason in skipped)
            raise CheckpointError(f"there is no checkpoint in {store.root} to take the model from{reasons}")
        return newest
    steps = {checkpoint.step: checkpoint for checkpoint in store.list()}
    if step not in steps:
        kept = ", ".join(map(str, sorted(steps))) or "none"
        raise CheckpointError(f"{store.root} has no checkpoint of step {step}", hint=f"expected one of: {kept}")
    return steps[step]


def _check(store: Store, checkpoint: Checkpoint) -> None:
    state = store.load_document(checkpoint, "state")
    try:
        check(state, {"model?": {...: str}})
        check_weights(state, store, checkpoint)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path} is damaged: {error}") from None


def _refuse_unknown(weights: str, store: Store, checkpoint: Checkpoint) -> None:
    if weights not in (known := [LIVE, *store.weight_sets(checkpoint)]):
        raise CheckpointError(
            f"{checkpoint.path} has no weights of the name {weights!r}{did_you_mean(weights, known)}",
            hint=f"expected one of {', '.join(known)}",
        )


def _load_set(model: torch.nn.Module, store: Store, checkpoint: Checkpoint, name: str) -> None:
    """Copy a set of weights into the model."""
    try:
        pairs = paired(model, store.load_tensors(checkpoint, weights_stem(name)))
    except PluginError as error:
        raise CheckpointError(f"{checkpoint.path}, weights {name!r}: {error}") from None
    with torch.no_grad():
        for parameter, tensor in pairs:
            parameter.copy_(tensor)


def _eod_id(info: dict[str, Any]) -> int | None:
    """The id that ends a document. Earlier versions do not record it: their tokenizers have a known name for it."""
    eod_id: int | None = info.get("run", {}).get("data", {}).get("eod_id")
    return eod_id


def _read_info(run_dir: RunDir) -> dict[str, Any]:
    try:
        info: dict[str, Any] = read(run_dir.run_json, _INFO)["facts"]
        return info
    except FileNotFoundError:
        raise CheckpointError(f"{run_dir.run_json} is missing: it says which model the checkpoint is of") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run_dir.run_json} is damaged ({error}): it says which model this is") from error
