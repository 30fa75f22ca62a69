"""The examples for schedulers, each with a fake scheduler: what is restarted, what is not, and the result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gpt_simple.errors import ExitCode
from tests.children import wait_until
from tests.conftest import CONFIG

EXAMPLES = Path(__file__).parents[2] / "examples/orchestrators"

FAKE = """\
#!/bin/bash
echo "$@" >> calls
code=$(head -n 1 codes)
sed -i 1d codes
if [ "$code" = waits ]; then
  trap 'exit 75' TERM
  while :; do sleep 0.05; done
fi
if [ "${code%+}" != "$code" ]; then
  mkdir -p "out/checkpoints/step-$(printf %08d "$(wc -l < calls)")"
fi
exit "${code%+}"
"""
SLEEP = '#!/bin/bash\necho "$@" >> pauses\n'

Bin = Callable[..., dict[str, str]]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bin:
    """An environment with these programs first in the path."""
    monkeypatch.chdir(tmp_path)

    def make(**scripts: str) -> dict[str, str]:
        directory = tmp_path / "bin"
        directory.mkdir()
        for name, text in scripts.items():
            path = directory / name.replace("_", "-")
            path.write_text(text)
            path.chmod(0o755)
        return os.environ | {
            "PATH": f"{directory}{os.pathsep}{os.environ['PATH']}",
            "PAUSE": "0",
            "OMP_NUM_THREADS": "1",
        }

    return make


def calls() -> list[str]:
    return Path("calls").read_text().splitlines()


@pytest.mark.parametrize(
    ("codes", "ends", "pauses"),
    [
        (["0"], 0, []),
        (["137+", "75+", "1+", "0"], 0, [2, 2, 2]),
        (["75+", "76"], 76, [2]),
        (["2"], 2, []),
        (["4"], 4, []),
        (["130"], 130, []),
        (["1", "137", "75", "1", "137", "139", "0"], 139, [4, 6, 8, 10, 12]),
        (["75", "75", "75", "75", "75", "75", "0"], 75, [4, 6, 8, 10, 12]),
        (["75", "1", "75+", "75", "0"], 0, [4, 6, 2, 4]),
    ],
)
def test_the_loop_resumes_until_done_and_ends_on_errors(
    programs: Bin, codes: list[str], ends: int, pauses: list[int]
) -> None:
    """``+``: the launch saved a checkpoint before it ended."""
    Path("codes").write_text("".join(f"{code}\n" for code in codes))
    Path("pauses").touch()
    command = ["bash", str(EXAMPLES / "loop.sh"), "out", "config.toml", "--training.seed", "1"]
    environment = programs(gpt_simple=FAKE, sleep=SLEEP) | {"PAUSE": "2"}
    done = subprocess.run(command, env=environment, check=False, timeout=60, capture_output=True, text=True)
    assert done.returncode == ends
    assert calls() == ["run config.toml --training.seed 1 --training.output_dir out"] * (len(pauses) + 1)
    assert [int(line) for line in Path("pauses").read_text().split()] == pauses
    assert ("6 launches in a row ended without a new checkpoint" in done.stderr) == (len(pauses) == 5)


@pytest.mark.parametrize("code", ["75", "1"])
def test_a_signal_ends_the_loop_while_it_pauses(programs: Bin, code: str) -> None:
    Path("codes").write_text(f"{code}\n0\n")
    environment = programs(gpt_simple=FAKE) | {"PAUSE": "20"}
    with subprocess.Popen(["bash", str(EXAMPLES / "loop.sh"), "out", "config.toml"], env=environment) as loop:
        wait_until(lambda: Path("codes").read_text() == "0\n")
        time.sleep(0.5)
        loop.send_signal(signal.SIGTERM)
        assert loop.wait(10) == int(code)
    assert len(calls()) == 1


def test_the_loop_passes_a_signal_on_and_ends_with_the_run(programs: Bin) -> None:
    Path("codes").write_text("waits\n0\n")
    command = ["bash", str(EXAMPLES / "loop.sh"), "out", "config.toml"]
    with subprocess.Popen(command, env=programs(gpt_simple=FAKE)) as loop:
        wait_until(lambda: not Path("codes").read_text().startswith("waits"))
        time.sleep(0.2)
        loop.send_signal(signal.SIGTERM)
        assert loop.wait(30) == 75
    assert len(calls()) == 1


SBATCH = '#!/bin/bash\necho "$@" >> queue\n'


@pytest.mark.parametrize(
    ("code", "links", "ends", "queued"),
    [(75, "2", 0, True), (75, "0", 75, False), (0, "2", 0, False), (76, "2", 76, False)],
)
def test_a_job_of_the_chain_submits_the_next_until_done(
    programs: Bin, code: int, links: str, ends: int, queued: bool
) -> None:
    Path("codes").write_text(f"{code}\n")
    script = str(EXAMPLES / "slurm.sbatch")
    environment = programs(gpt_simple=FAKE, sbatch=SBATCH) | {"SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", script, "config.toml", links], env=environment, check=False, timeout=60)
    assert done.returncode == ends
    expected = f"--dependency=afterany:7 {script} config.toml {int(links) - 1}\n"
    assert (Path("queue").read_text() if Path("queue").exists() else "") == (expected if queued else "")


def test_a_job_of_the_chain_passes_a_signal_on(programs: Bin) -> None:
    Path("codes").write_text("waits\n")
    environment = programs(gpt_simple=FAKE, sbatch=SBATCH) | {"SLURM_JOB_ID": "7"}
    with subprocess.Popen(["bash", str(EXAMPLES / "slurm.sbatch"), "config.toml"], env=environment) as job:
        wait_until(lambda: not Path("codes").read_text().startswith("waits"))
        time.sleep(0.2)
        job.send_signal(signal.SIGTERM)
        assert job.wait(30) == 0
    assert Path("queue").exists()


@pytest.mark.slow
def test_a_chain_of_short_jobs_equals_one_long_job(programs: Bin) -> None:
    program = f'#!/bin/bash\nexec {sys.executable} -P -m gpt_simple "$@"\n'
    environment = programs(gpt_simple=program, sbatch=SBATCH)
    options = {
        "max_steps = 4": "max_steps = 10000\nwalltime_reserve_seconds = 1",
        "save_steps = 2": "save_steps = 1000",
    }
    text = CONFIG.replace("eval_steps = 4", "eval_steps = 0").replace("logging_steps = 2", "logging_steps = 100")
    for old, new in options.items():
        text = text.replace(old, new)
    Path("config.toml").write_text(text)
    Path("whole.toml").write_text(text.replace('"out"', '"whole"'))
    subprocess.run(
        ["gpt-simple", "run", "whole.toml", "--nproc_per_node", "1"], env=environment, check=True, timeout=300
    )
    job, arguments = 1, [str(EXAMPLES / "slurm.sbatch"), "config.toml"]
    while arguments and job < 40:
        now = time.time()
        times = {"SLURM_JOB_START_TIME": f"{now}", "SLURM_JOB_END_TIME": f"{now + 12}", "SLURM_JOB_ID": str(job)}
        subprocess.run(["bash", *arguments], env=environment | times, check=True, timeout=300)
        queue = Path("queue")
        arguments = queue.read_text().split()[1:] if queue.exists() else []
        queue.unlink(missing_ok=True)
        job += 1
    assert job > 2, "one job did it all: there was no chain"
    for stem in ("model", "optimizer"):
        parts, whole = (Path(f"{run}/checkpoints/step-00010000/{stem}.safetensors") for run in ("out", "whole"))
        assert parts.read_bytes() == whole.read_bytes()


def test_kubernetes_restarts_stopped_runs_and_fails_on_errors() -> None:
    job = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())["spec"]
    decided = {code: action(job, int(code)) for code in ExitCode if code != ExitCode.COMPLETED}
    people = {ExitCode.CONFIG, ExitCode.DATA, ExitCode.CHECKPOINT, ExitCode.PLUGIN, ExitCode.HALTED}
    assert {code for code, what in decided.items() if what == "FailJob"} == people
    assert decided[ExitCode.STOPPED] == "Ignore"
    assert action(job, 137) == decided[ExitCode.FAILURE] == "Count"
    assert action(job, 143, conditions=["DisruptionTarget"]) == "Ignore"
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "a podFailurePolicy is refused otherwise"
    assert pod["containers"][0]["command"][:2] == ["gpt-simple", "run"]


def action(job: dict[str, Any], code: int, conditions: list[str] | None = None) -> str:
    """The action of the Job controller for a failed pod: the first rule that matches decides."""
    for rule in job["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {})
        assert codes.get("operator", "In") == "In"
        wanted = {condition["type"] for condition in rule.get("onPodConditions", ())}
        if code in codes.get("values", ()) or wanted & set(conditions or ()):
            return str(rule["action"])
    return "Count"
