"""A file system that turns read-only while a run writes to it, as Linux does after an error of the disk."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt_simple import GptSimpleError
from tests.checkpoint.injection import outcome, start
from tests.job.test_endings import does
from tests.tiny import TinyRun

_WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.utime", "os.link"}

MOMENTS = {
    "claim": None,
    "build": ("on_model_built", None),
    "start": ("on_run_start", None),
    "first step": ("on_step_start", 2),
    "step": ("on_step_end", 3),
    "save": ("on_checkpoint_saving", 2),
    "evaluation": ("on_eval_end", 4),
    "last step": ("on_step_end", 6),
}


def read_only(directory: Path) -> Callable[..., None]:
    """From the call of the result on, every change below ``directory`` fails in this process."""
    is_on = [False]

    def path_of(what: object) -> str:
        return os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.path.abspath(os.fsdecode(what))  # type: ignore[arg-type]

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if is_on[0] and (writes or event in _WRITES) and path_of(arguments[0]).startswith(str(directory)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), arguments[0])

    sys.addaudithook(audit)
    return lambda *_: is_on.__setitem__(0, True)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_read_only_disk_ends_in_an_error_and_loses_nothing(
    tiny: TinyRun, tmp_path: Path, capfd: pytest.CaptureFixture[str], moment: str, background: bool
) -> None:
    assert tiny(training__max_steps=1).status == "completed"
    logs = does("on_metrics", lambda run: run.log.warning("a plugin logs", name="logs"))

    def work() -> None:
        turn = read_only(tmp_path / "run")
        if (when := MOMENTS[moment]) is None:
            turn()
        turns = type("Turns", (does(*when[:1], turn, when[1]),), {}) if when else logs
        try:
            result = tiny(
                plugins=list(dict.fromkeys([logs, turns])),
                training__max_steps=6,
                training__save_steps=2,
                training__eval_steps=2,
                training__logging_steps=1,
                training__background_save=background,
            )
            code = int(result.exit_code)
        except GptSimpleError as error:
            print(error)
            code = int(error.exit_code)
        os._exit(code)

    code = outcome(start(work))
    out, err = capfd.readouterr()
    assert code == 4, out + err
    assert "Read-only file system" in out
    assert "Traceback" not in out + err
    assert tiny(training__max_steps=6).steps == 6
