"""Commands without computation start at once: torch, wandb and accelerate are not imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart.toml"
PROBE = """
import sys
from gpt_simple.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as leaving:
    code = leaving.code or 0
print(sorted({"torch", "wandb", "accelerate", "numpy"} & set(sys.modules)), int(code), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        ["run", "--help"],
        ["plugins", "list"],
        ["config", "show", str(EXAMPLE)],
        ["validate", str(EXAMPLE)],
    ],
    ids=lambda arguments: " ".join(Path(argument).name for argument in arguments),
)
def test_no_heavy_import(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[] 0", done.stderr
    assert done.stdout


def test_validate_inspects_prepared_data_without_numpy(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.txt").write_text("a few words " * 500)
    (tmp_path / "raw" / "b.txt").write_text("some others " * 500)
    places = [f"--input_dir={tmp_path / 'raw'}", f"--output_dir={tmp_path / 'data'}", "--tokenizer=bytes"]
    subprocess.run([sys.executable, "-m", "gpt_simple", "tokenize", *places], capture_output=True, check=True)
    settings = [f"--data.path={tmp_path / 'data'}", f"--training.output_dir={tmp_path / 'run'}", "--json"]
    arguments = ["validate", *settings, "--training.compile=false"]
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[] 0", done.stdout + done.stderr
    (data,) = (each for each in json.loads(done.stdout)["findings"] if each["code"] == "data")
    assert data["fields"]["train_tokens"] + data["fields"]["val_tokens"] == 12 * 500 * 2 + 2


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, gpt_simple; gpt_simple.Config(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("processes", [[], ["--nproc_per_node=2"]], ids=["alone", "launched"])
def test_bad_data_are_reported_without_loading_torch(tmp_path: Path, processes: list[str]) -> None:
    (tmp_path / "raw").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "raw" / name).write_bytes(b"\xff")
    for path, place in (("raw", "b.txt"), ("missing", "no such file")):
        arguments = ["run", f"--data.path={tmp_path / path}", f"--training.output_dir={tmp_path / 'run'}", *processes]
        done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True)
        assert done.stderr.splitlines()[-1] == "[] 3", done.stderr
        assert place in done.stderr
        assert ("on_bad_document" in done.stderr) == (path == "raw")


def test_a_mistake_is_reported_without_loading_torch() -> None:
    arguments = ["run", str(EXAMPLE), "--training.max_step", "5"]
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[] 2"
