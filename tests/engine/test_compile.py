"""The compile plan and its note."""

from __future__ import annotations

from typing import Any

import torch

from gpt_simple.config.schema import TrainingConfig
from gpt_simple.engine.compile import plan


def note(processes: int, **changes: Any) -> str:
    config = TrainingConfig(compile=True, compile_backend="eager", **changes)
    return plan(config, torch.device("cpu"), processes, explicit=True).note


def test_the_note_names_the_setting_of_the_graph_splitter() -> None:
    flag = "torch._dynamo.config.optimize_ddp is"
    assert note(2) == f"{flag} False until the run ends (compile, DDP and gradient checkpointing together)"
    assert note(2, ddp_optimizer="split") == f"{flag} True until the run ends (training.ddp_optimizer)"
    assert note(2, gradient_checkpointing=False) == note(1) == ""
    assert note(1, ddp_optimizer="off") == 'training.ddp_optimizer "off" changes nothing: there is one process'
    assert note(2, ddp_optimizer="off", compile_scope="blocks").endswith('training.compile_scope is "blocks"')
