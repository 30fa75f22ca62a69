"""How long the commands take that one types without training: the whole process, torch never imported.

python benchmarks/startup.py [--runs 15]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--runs", type=int, default=15)
arguments = parser.parse_args()

PROGRAM = shutil.which("gpt-simple", path=str(Path(sys.executable).parent)) or "gpt-simple"
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "--version": [PROGRAM, "--version"],
    "--help": [PROGRAM, "--help"],
    "plugins list": [PROGRAM, "plugins", "list"],
    "config show": [PROGRAM, "config", "show", "examples/quickstart.toml"],
    "validate": [PROGRAM, "validate", "examples/quickstart.toml"],
}


def milliseconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return 1e3 * (time.perf_counter() - started)


report = {}
for name, command in COMMANDS.items():
    milliseconds(command)  # fills the file cache and writes bytecode
    times = [milliseconds(command) for _ in range(arguments.runs)]
    report[name] = {"median_ms": round(statistics.median(times), 1), "min_ms": round(min(times), 1)}
print(json.dumps(report, indent=1))
