"""The counters of a run go into a checkpoint and come back."""

from __future__ import annotations

from gpt_simple.engine.state import TrainState


def test_counters_survive_a_checkpoint() -> None:
    state = TrainState()
    state.advance(tokens=64, target_tokens=60)
    state.record_val_loss(2.5)
    state.record_val_loss(3.0)
    state.finish("no better")
    restored = TrainState()
    restored.load_state_dict(state.state_dict() | {"samples": 4})
    counters = {"step": 1, "tokens": 64, "target_tokens": 60, "best_val_loss": 2.5}
    assert state.state_dict() == counters | {"finished": "no better"}
    assert restored.state_dict() == counters | {"finished": ""}, "a run that continues is not finished"
