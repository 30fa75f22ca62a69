"""Makes the files of a kept example with the gpt-simple that is imported: ``python make_example.py FOLDER``.

The folder holds ``stories.toml``, ``dataset.toml``, ``rows.py`` and ``text/``. Each run is made twice: to its end, for
``expected.json``, and stopped midway. The stopped run is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RUNS = ("stories", "dataset")
PLUGIN = ("-p", "./rows.py")
TOKENIZE = ("--tokenizer", "bytes", "--val_fraction", "0.2")


def main(folder: Path) -> None:
    for made in ("dataset", "runs"):
        shutil.rmtree(folder / made, ignore_errors=True)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory) / "example"
        shutil.copytree(folder, place)
        command(place, "tokenize", "--input_dir", "text", "--output_dir", "dataset", *TOKENIZE)
        expected = {}
        for run in RUNS:
            command(place, "run", f"{run}.toml", *PLUGIN)
            expected[run] = outcome(place / "runs" / run)
        shutil.rmtree(place / "runs")
        for run in RUNS:
            command(place, "run", f"{run}.toml", *PLUGIN, stop_after="4")
        clean(place)
        for made in ("dataset", "runs"):
            shutil.copytree(place / made, folder / made, ignore=shutil.ignore_patterns("*.lock"))
        (folder / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")


def command(place: Path, *arguments: str, stop_after: str = "0") -> None:
    """Run gpt-simple in ``place`` as a user does, with one thread, so that the number of cores does not matter."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "STOP_AFTER": stop_after,
        "GPT_SIMPLE_CACHE": str(place / "cache"),
    }
    done = subprocess.run([sys.executable, "-m", "gpt_simple", *arguments], cwd=place, env=environment, check=False)
    assert done.returncode == (0 if stop_after == "0" else 75), arguments


def outcome(run_dir: Path) -> dict[str, Any]:
    """The results of a run: weights, rows, losses, and the numerics that decide the last digits."""
    newest = max((run_dir / "checkpoints").glob("step-*"))
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {
        "step": int(newest.name.removeprefix("step-")),
        "weights": hashlib.sha256((newest / "model.safetensors").read_bytes()).hexdigest(),
        "rows": json.loads((newest / "plugins.json").read_text())["rows"]["state"]["digest"],
        "losses": {str(row["step"]): row["train/loss"] for row in rows if row["kind"] == "train"},
        "numerics": json.loads((newest / "state.json").read_text())["run"]["numerics"],
    }


def clean(place: Path) -> None:
    """Remove the names of this machine and of its directories from the runs' files."""
    for path in place.glob("runs/*/*.json*"):
        text = path.read_text().replace(str(place), "/example")
        path.write_text(re.sub(r'"host": "[^"]*"', '"host": "example"', text))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
