"""``gpt-simple report``: what the page holds, read back by a parser."""

from __future__ import annotations

import json
import os
import random
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gpt_simple.report.history import read_history
from gpt_simple.report.page import page
from tests.conftest import Shell
from tests.report.conftest import Make, evaluated, event, train


def parsed(html: str) -> ElementTree.Element:
    """The page as XML: every element closed and nested, every character allowed."""
    return ElementTree.fromstring(html)


def texts(root: ElementTree.Element) -> str:
    return "\n".join(root.itertext())


def drawings(root: ElementTree.Element, over: str) -> dict[str, ElementTree.Element]:
    """The drawings over one axis by the title of their figure."""
    return {
        str(figure.findtext("figcaption")).strip(): figure.find(f"div[@class='over-{over}']/svg")  # type: ignore[misc]
        for figure in root.iter("figure")
    }


def test_a_real_run_becomes_a_page_that_stands_alone(shell: Shell, here: Path) -> None:
    assert shell("run", "config.toml").code == 0
    ended = shell("report", "out")
    assert ended.code == 0, ended.err
    html = (here / "out/report.html").read_text()
    root = parsed(html)
    assert set(drawings(root, "step")) >= {"Loss", "Learning rate", "Gradient norm", "Throughput", "Peak memory"}
    assert not re.search(r"""(?:src|href)\s*=|url\((?!#)|@import|<script""", html)
    assert "finished all 4 steps" in texts(root)
    assert "Samples over time" in texts(root)
    assert "perplexity" in texts(root)
    assert re.search(r"its time in plugins\s+[\d.]+ s \(\w+ [\d.]+ s, ", texts(root))


def test_html_parsers_agree_about_the_nesting(make: Make) -> None:
    open_elements: list[str] = []

    class Nesting(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            open_elements.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert open_elements.pop() == tag

    html = page([read_history(make("a"), "a")])
    Nesting().feed(html)
    assert open_elements == []
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'for="([^"]+)"', html)) | set(re.findall(r"url\(#([^)]+)\)", html)) == set(ids)


def test_text_of_a_run_is_never_markup(make: Make) -> None:
    html = page([read_history(make("a"), "a<b&c>")])
    root = parsed(html)
    assert "<script" not in html
    assert "\x00" not in html
    assert "Once </pre><script>alert(1)</script> \ufffd\ufffd[31m" in texts(root)
    assert "beware <b>" in texts(root)
    assert "a<b&c>" in texts(root)


def test_secrets_of_the_configuration_are_left_out(make: Make) -> None:
    secrets = {"plugins.tables.notify.webhook_url": "https://hidden", "plugins.tables.notify.every": 3}
    html = page([read_history(make("a", **secrets), "a"), read_history(make("b"), "b")])
    assert "https://hidden" not in html
    assert "plugins.notify.every" in html


def test_several_runs_are_overlaid_and_compared(shell: Shell, make: Make, tmp_path: Path) -> None:
    one, two = make("one"), make("two", **{"optimizer.learning_rate": 3e-4})
    ended = shell("report", str(one), str(two), "-o", str(tmp_path / "both.html"))
    assert ended.code == 0, ended.err
    root = parsed((tmp_path / "both.html").read_text())
    labels = [title.text for title in drawings(root, "step")["Loss"].iter("title")]
    assert {"one: training", "two: training", "one: validation", "two: validation", "floor"} <= set(labels)
    (heading,) = [h for h in root.iter("h2") if h.text == "Differences of configuration"]
    tables = [texts(table) for table in root.iter("table")]
    assert heading is not None
    assert "optimizer.learning_rate" in tables[1]
    assert "0.0003" in tables[1]
    assert "max_steps" not in tables[1]


def test_a_run_that_is_named_twice_is_shown_once(shell: Shell, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make("one").parent)
    ended = shell("report", "one", "./one/", "two/../one")
    assert (ended.code, ended.out.split(" ")[0]) == (0, "one/report.html"), ended.err
    assert ended.err == "a run that is named twice is shown once\n"


def test_figures_are_of_all_processes_unless_they_say_otherwise(make: Make) -> None:
    root = make("a", [train(step, **{"perf/tokens_per_second": 10.0 * step}) for step in range(10, 101, 10)])
    summary = {"seconds": 65.0, "tokens_per_second": 1.0, "peak_memory_gib": 0.1, "plugin_seconds": {"sample": 2.0}}
    (root / "summary.json").write_text(json.dumps(summary))
    table = next(parsed(page([read_history(root, "a")])).iter("table"))
    facts = {str(row.findtext("th")): row.findtext("td") for row in table.iter("tr")}
    assert facts["median tokens/s"] == "550"
    assert facts["peak memory"] == "0.50 GiB"
    assert facts["time to the last training row"] == "100 s"
    assert facts["time of the last process"] == "65 s"
    assert facts["its time in plugins"] == "2 s (sample 2 s)"


def test_a_step_has_the_sample_of_each_prompt(make: Make) -> None:
    rows = [train(100), *(event(100, "sample", text) | {"index": n} for n, text in enumerate(("One", "Two")))]
    root = parsed(page([read_history(make("a", rows), "a")]))
    (step,) = root.iter("details")
    assert [text.text for text in step.iter("pre")] == ["One", "Two"]


def test_steps_of_the_rows_count_before_the_status_has_them(make: Make) -> None:
    root = make("a")
    (root / "status.json").write_text('{"state": "running", "step": 40, "max_steps": 200}')
    table = next(parsed(page([read_history(root, "a")])).iter("table"))
    assert {str(row.findtext("th")): row.findtext("td") for row in table.iter("tr")}["steps"] == "100 of 200"


def test_samples_that_are_left_out_are_counted(make: Make) -> None:
    rows = [train(100), *(event(step, "sample", "Once") for step in range(1, 17))]
    root = parsed(page([read_history(make("a", rows), "a")]))
    assert len(list(root.iter("details"))) == 12
    assert "12 of 16, evenly spread." in texts(root)
    assert "evenly" not in texts(parsed(page([read_history(make("b"), "b")])))


def test_resumes_and_skipped_steps_are_marked_on_every_axis(make: Make) -> None:
    rows = [train(step, **({"train/skipped_steps": 2.0} if step == 30 else {})) for step in range(10, 101, 10)]
    root = parsed(page([read_history(make("a", rows), "a")]))
    for over in ("step", "tokens", "time"):
        titles = [title.text for title in drawings(root, over)["Loss"].iter("title")]
        assert "a: resumed from step 50 on second" in titles
        assert "a: 2 skipped up to step 30" in titles


def nan(step: int) -> dict[str, Any]:
    return train(step, **{"train/loss": None, "nonfinite": {"train/loss": "nan"}})


def test_a_loss_that_was_no_number_is_a_gap_in_its_curve(make: Make) -> None:
    rows = [train(10), train(20), nan(30), train(40), nan(50), train(60), train(70)]
    loss = drawings(parsed(page([read_history(make("a", rows), "a")])), "step")["Loss"]
    lines = [path.get("d") or "" for path in loss.iter("path") if path.get("class") == "line c0"]
    assert [line.count("M") for line in lines] == [2], "before 30 and after 50"
    alone = [path.get("d") or "" for path in loss.iter("path") if path.get("class") == "points c0"]
    assert [line.count("M") for line in alone] == [1], "the point at 40"


def test_a_run_that_ended_in_nan_says_so(make: Make) -> None:
    root = make("a", [train(10), nan(20)])
    table = next(parsed(page([read_history(root, "a")])).iter("table"))
    assert {str(row.findtext("th")): row.findtext("td") for row in table.iter("tr")}["training loss"] == "nan"


def test_a_run_without_a_number_has_a_page(make: Make) -> None:
    for name, rows in {"only nan": [nan(1), nan(2)], "one row": [train(1)], "nothing": []}.items():
        parsed(page([read_history(make(name, rows), name)]))
    diverged = [*map(train, range(1, 4)), *map(nan, range(4, 200))]
    assert "Loss" in drawings(parsed(page([read_history(make("diverged", diverged), "a")])), "step")


def test_a_noisy_curve_is_drawn_with_the_median_of_its_stretches(make: Make) -> None:
    rows = [train(step, **{"train/loss": 2.0 + (step % 2)}) for step in range(1, 1001)]
    rows[500]["train/loss"] = 1e9
    trend = read_history(make("a", rows), "a").trend("train/loss", 100)
    assert len(trend.y) == 100
    assert all(2.0 <= value <= 3.0 for value in trend.y)
    assert trend.x["step"][0] == 6
    loss = drawings(parsed(page([read_history(make("b", rows), "b")])), "step")["Loss"]
    assert {path.get("class") for path in loss.iter("path")} >= {"raw c0", "line c0"}
    assert not read_history(make("c"), "c").trend("train/loss", 100), "ten rows have no noise to see through"


def test_all_drawings_have_one_horizontal_axis(make: Make) -> None:
    """Or the eye could not follow a resume, which is upright in each of them, from one to the next."""
    rows = [*map(train, range(10, 101, 10)), {**evaluated(60), "eval/bits_per_byte": 1.0}, evaluated(100)]
    drawn = drawings(parsed(page([read_history(make("a", rows), "a")])), "step")
    places = {path.get("d") for svg in drawn.values() for path in svg.iter("path") if path.get("class") == "resume c0"}
    assert len(drawn) >= 5
    assert len({re.match(r"M[\d.]+", str(place))[0] for place in places}) == 1  # type: ignore[index]


def test_the_legend_has_what_is_in_the_drawings(make: Make) -> None:
    def legend(root: Path) -> str:
        return texts(next(parsed(page([read_history(root, "a")])).iter("ul")))

    assert "skipped" not in legend(make("a"))
    assert "resumed" in legend(make("b"))
    assert "skipped" in legend(make("c", [train(10, **{"train/skipped_steps": 1.0})]))


@pytest.mark.parametrize(
    ("seconds", "ticks"),
    [(60, ["0 s", "10 s"]), (7000, ["0 min", "20 min"]), (80_000, ["0 h", "5 h"]), (500_000, ["0 d", "1 d"])],
)
def test_time_is_in_round_numbers_of_a_common_unit(make: Make, seconds: int, ticks: list[str]) -> None:
    rows = [train(10) | {"time": 1000.0}, train(20) | {"time": 1000.0 + seconds}]
    record = json.loads((root := make("a", rows)).joinpath("run.json").read_text())
    record["lineage"] = record["lineage"][:1]
    (root / "run.json").write_text(json.dumps(record))
    loss = drawings(parsed(page([read_history(root, "a")])), "time")["Loss"]
    labels = [text.text for text in loss.iter("text") if text.get("text-anchor") in ("middle", "end")]
    assert [label for label in labels if str(label).endswith(ticks[0][1:])][:2] == ticks


def test_a_report_of_no_run_exits_4_and_an_unwritable_place_2(shell: Shell, make: Make, tmp_path: Path) -> None:
    missing = shell("report", str(tmp_path / "nowhere"))
    assert (missing.code, missing.err.count("\n")) == (4, 1)
    (tmp_path / "file").touch()
    no_directory = shell("report", str(tmp_path / "file"))
    assert (no_directory.code, no_directory.err.count("\n")) == (4, 1)
    (make("damaged") / "run.json").write_text('{"lineage": [], "facts": {}}')
    damaged = shell("report", str(tmp_path / "damaged"))
    assert (damaged.code, damaged.err.count("\n")) == (4, 1)
    unwritable = shell("report", str(make("a")), "-o", str(tmp_path / "no/such/place.html"))
    assert (unwritable.code, unwritable.err.count("\n")) == (2, 1)


def test_100000_steps_stay_small(make: Make) -> None:
    noise = random.Random(0).random
    rows = [train(step, **{"train/loss": 2 + noise(), "train/grad_norm": noise()}) for step in range(1, 100_001)]
    root = make("long", rows)
    started = time.process_time()
    html = page([read_history(root, "long")])
    assert len(html) < 2_000_000
    assert time.process_time() - started < 6  # 3 s and room for a slow machine


@pytest.mark.parametrize("options", [(), ("-o", "out/report.html")])
def test_a_file_that_is_no_report_is_not_replaced(shell: Shell, here: Path, make: Make, options: tuple[str]) -> None:
    make("a").rename(here / "out")
    target = here / "out/report.html"
    target.write_text("mine")
    ended = shell("report", "out", *options)
    assert (ended.code, "out/report.html is there already and is no report" in ended.err) == (2, True), ended.err
    assert target.read_text() == "mine"
    target.unlink()
    assert [shell("report", "out", *options).code for _ in range(2)] == [0, 0]


def test_a_report_replaces_a_link_and_not_its_target(shell: Shell, here: Path, make: Make) -> None:
    make("a").rename(here / "out")
    assert shell("report", "out", "-o", "older.html").code == 0
    older = (here / "older.html").read_bytes()
    (here / "out/report.html").symlink_to(here / "older.html")
    (here / "older.html").write_bytes(older + b"\n")
    assert shell("report", "out").code == 0
    assert not (here / "out/report.html").is_symlink()
    assert (here / "older.html").read_bytes() == older + b"\n"


def test_a_report_goes_through_a_pipe_and_a_named_link(shell: Shell, here: Path, make: Make) -> None:
    os.mkfifo(here / "pipe")
    (here / "link").symlink_to(here / "pipe")
    reader = os.open(here / "pipe", os.O_RDWR)  # as if somebody read it; it holds 64 KiB
    make("a").rename(here / "out")
    for name in ("pipe", "link"):
        assert shell("report", "out", "-o", name).code == 0
        assert os.read(reader, 1 << 20).startswith(b"<!DOCTYPE html>")
    os.close(reader)
    assert (here / "link").is_symlink()
