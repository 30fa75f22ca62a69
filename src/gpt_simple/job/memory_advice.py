"""What to change in a configuration whose run does not fit into memory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch

from gpt_simple._names import PROGRAM
from gpt_simple.config.schema import Config
from gpt_simple.engine.activation_checkpointing import ActivationCheckpointing
from gpt_simple.machine_failures import explained_machine_failures
from gpt_simple.spec import RunSpec


def advised_failures(
    spec: RunSpec, device: torch.device, checkpointing: ActivationCheckpointing
) -> AbstractContextManager[None]:
    """Raise used-up memory and a lost ``device`` as errors that say what to change in the run's configuration."""
    config = checkpointing.applied(spec.config)
    return explained_machine_failures(
        lambda on_device: memory_advice(config, spec.source, on_device=on_device or device.type == "cpu")
    )


def memory_advice(config: Config, source: Path | None, *, on_device: bool) -> str:
    """For the memory of the device, or else of the host."""
    training = config.training
    changes = []
    if not on_device and training.saves_in_background("cuda"):  # on a CPU its memory is that of the device
        changes.append("set training.background_save to false: it holds a copy of the state in host memory")
    if (rows := training.per_device_batch_size) > 1:
        # The smallest divisor, so that a step has as many rows as before.
        parts = next(number for number in range(2, rows + 1) if rows % number == 0)
        accumulation = parts * training.gradient_accumulation_steps
        changes.append(
            f"set training.per_device_batch_size to {rows // parts} and training.gradient_accumulation_steps to"
            f" {accumulation}: a step has the same rows"
        )
    if training.activation_memory_budget:
        changes.append("lower training.activation_memory_budget")
    elif not training.gradient_checkpointing and training.activation_memory_budget is None:
        changes.append("set training.gradient_checkpointing to true")
    if not changes:
        changes.append("shorten data.max_length, or make the model smaller")
    file = source or "CONFIG"
    return f"{', or '.join(changes)}; `{PROGRAM} validate {file} --fit` finds the largest batch"
