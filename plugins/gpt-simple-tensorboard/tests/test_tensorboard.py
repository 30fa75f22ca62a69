"""What TensorBoard's own reader finds in the files of a run, also across a crash."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from gpt_simple_tensorboard import TensorBoard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_simple import Plugin, PluginError, Run, hookimpl
from gpt_simple.hooks import NoConfig, StepEnd
from gpt_simple.testing import check_contract, train


def read(directory: Path) -> EventAccumulator:
    return EventAccumulator(str(directory)).Reload()


def points(events: EventAccumulator, name: str) -> dict[int, float]:
    found = events.Scalars(name)
    assert len({point.step for point in found}) == len(found), "a step twice"
    return {point.step: point.value for point in found}


def texts(events: EventAccumulator, name: str) -> list[str]:
    return [tensor.tensor_proto.string_val[0].decode() for tensor in events.Tensors(f"{name}/text_summary")]


def test_keeps_the_contract() -> None:
    check_contract(TensorBoard)


def test_every_metric_and_the_configuration_are_logged(tmp_path: Path) -> None:
    trained = train(TensorBoard, output_dir=tmp_path, max_steps=4, enable=("sample",))
    events = read(tmp_path / "tensorboard")
    losses = points(events, "train/loss")
    assert sorted(losses) == [1, 2, 3, 4]
    assert losses[4] == pytest.approx(trained.result.final_loss)
    assert sorted(points(events, "eval/loss")) == [2, 4]
    (config,) = texts(events, "config")
    assert '"max_steps": 4' in config
    assert len(texts(events, "sample")) == 2


class Crashes(Plugin[NoConfig]):
    on_error = "abort"

    @hookimpl
    def on_step_end(self, run: Run, event: StepEnd) -> None:
        if event.step == 4:
            raise RuntimeError("the test crashes")


def test_steps_made_again_after_a_crash_replace_the_old_points(tmp_path: Path) -> None:
    # Checkpoints at 2; step 3 is logged and lost.
    with pytest.raises(PluginError):
        train(TensorBoard, Crashes, output_dir=tmp_path, max_steps=6)
    lost = points(read(tmp_path / "tensorboard"), "train/loss")
    assert sorted(lost) == [1, 2, 3]
    time.sleep(1.1)  # files are ordered by the second in their name
    train(TensorBoard, output_dir=tmp_path, max_steps=6)
    assert sorted(points(read(tmp_path / "tensorboard"), "train/loss")) == [1, 2, 3, 4, 5, 6]


def test_secrets_do_not_reach_the_files(tmp_path: Path) -> None:
    train(TensorBoard, output_dir=tmp_path, overrides={"data.path": "https://me:hunter2@host/data"})
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"hunter2" not in file.read_bytes()
    assert b"(redacted)" in file.read_bytes()
