"""A process finds its group by variables of the environment: one needs none, and what is missing is named."""

from __future__ import annotations

import os

import pytest

from gpt_simple.distributed.process_group import ProcessGroup
from gpt_simple.errors import ConfigError
from tests.tiny import TinyRun

OF_TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def test_one_process_meets_nobody(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {**OF_TWO, "WORLD_SIZE": "1", "MASTER_ADDR": "no.such.host"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    assert tiny().status == "completed"
    assert {name: os.environ[name] for name in alone} == alone


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        *(({name: None}, rf"\${name} is not set") for name in OF_TWO if name != "WORLD_SIZE"),
        (
            dict.fromkeys(name for name in OF_TWO if name != "WORLD_SIZE"),
            r"\$RANK, \$LOCAL_RANK, \$MASTER_ADDR, \$MASTER_PORT are not",
        ),
        ({"RANK": "x"}, r"\$RANK is 'x': expected a number below \$WORLD_SIZE"),
        ({"RANK": "2"}, r"\$RANK is '2'"),
        ({"LOCAL_RANK": "-1"}, r"\$LOCAL_RANK is '-1'"),
        ({"MASTER_PORT": "http"}, r"\$MASTER_PORT is 'http'"),
    ],
    ids=str,
)
def test_a_missing_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, str | None], message: str
) -> None:
    for name in OF_TWO:
        monkeypatch.delenv(name, raising=False)
    for name, value in (OF_TWO | changed).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        ProcessGroup.join(1.0)
