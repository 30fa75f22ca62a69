"""The plugin keeps the contract, and its files are complete, also after a stop and a resume."""

from __future__ import annotations

import csv
from pathlib import Path

from gpt_simple_csvlog import CsvLog

from gpt_simple.testing import check_contract, train


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def steps(path: Path) -> list[int]:
    return [int(row["step"]) for row in rows(path)]


def test_keeps_the_contract() -> None:
    check_contract(CsvLog)


def test_writes_a_row_for_each_logging_boundary_and_evaluation(tmp_path: Path) -> None:
    trained = train(CsvLog, output_dir=tmp_path, max_steps=4)
    assert steps(tmp_path / "train.csv") == [1, 2, 3, 4]
    assert steps(tmp_path / "eval.csv") == [2, 4]
    assert float(rows(tmp_path / "train.csv")[-1]["train/loss"]) == trained.result.final_loss


def test_columns_can_be_chosen_and_the_place_too(tmp_path: Path) -> None:
    overrides = {"plugins.csvlog.columns": ["train/lr", "no/such"], "plugins.csvlog.directory": "logs/csv"}
    train(CsvLog, output_dir=tmp_path, overrides=overrides)
    first = rows(tmp_path / "logs" / "csv" / "train.csv")[0]
    assert list(first) == ["step", "tokens", "train/lr", "no/such"]
    assert first["no/such"] == ""


def test_a_resumed_run_goes_on_without_rows_twice(tmp_path: Path) -> None:
    train(CsvLog, output_dir=tmp_path, max_steps=3)
    # As after a kill: rows were written for steps that no checkpoint has.
    with (tmp_path / "train.csv").open("a", newline="") as file:
        csv.writer(file).writerow([4, 0])
    train(CsvLog, output_dir=tmp_path, max_steps=5)
    assert steps(tmp_path / "train.csv") == [1, 2, 3, 4, 5]
