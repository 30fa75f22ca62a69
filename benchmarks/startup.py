"""Start-up time of the commands that do not train: the whole process, without torch.

Modules are loaded from bytecode, like those of an installed package, whatever PYTHONDONTWRITEBYTECODE is. Compiling
them each time would take a third longer. ``structuring`` is the validation of a configuration in which every field is
set, without the process around it. A command does it once, which is ``first_ms``. The commands take turns;
``of_the_imports`` compares medians with a process that imports click, attrs, cattrs, tomli and pluggy alone.

    python benchmarks/startup.py [--runs 15]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

from gpt_simple.config.load import read
from gpt_simple.config.render import to_json
from gpt_simple.config.schema import Config
from gpt_simple.config.structure import structure

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--runs", type=int, default=15)
arguments = parser.parse_args()

PROGRAM = shutil.which("gpt-simple", path=str(Path(sys.executable).parent)) or "gpt-simple"
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "imports": [sys.executable, "-c", "import click, attrs, cattrs, tomli, pluggy"],
    "--version": [PROGRAM, "--version"],
    "--help": [PROGRAM, "--help"],
    "plugins list": [PROGRAM, "plugins", "list"],
    "config show": [PROGRAM, "config", "show", "examples/quickstart.toml"],
    "validate": [PROGRAM, "validate", "examples/quickstart.toml"],
}


def milliseconds(command: list[str], bytecode: str) -> float:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environ | {"PYTHONPYCACHEPREFIX": bytecode})
    return 1e3 * (time.perf_counter() - started)


def in_short(times: list[float]) -> dict[str, float]:
    return {"median_ms": round(statistics.median(times), 2), "min_ms": round(min(times), 2)}


report: dict[str, dict[str, float]] = {}
with tempfile.TemporaryDirectory() as directory:
    for command in COMMANDS.values():
        milliseconds(command, directory)  # fills the file cache and writes bytecode
    rounds = [[milliseconds(command, directory) for command in COMMANDS.values()] for _ in range(arguments.runs)]
    for name, *times in zip(COMMANDS, *rounds, strict=True):
        report[name] = in_short(list(times))
    for of in report.values():
        of["of_the_imports"] = round(of["median_ms"] / report["imports"]["median_ms"], 2)
    everything = Path(directory) / "everything.json"
    everything.write_text(to_json(Config()))
    raw = read(everything, environ={})
    first, *later = [1e3 * seconds for seconds in timeit.repeat(lambda: structure(raw), number=1, repeat=101)]
    report["structuring"] = {"first_ms": round(first, 2), **in_short(later)}
print(json.dumps(report, indent=1))
