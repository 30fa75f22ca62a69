"""``gpt-simple report``: what the page holds, read back by a parser."""

from __future__ import annotations

import json
import math
import random
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gpt_simple.report.chart import Drawing, Line, Range
from gpt_simple.report.history import read_history, thin
from gpt_simple.report.page import page
from tests.conftest import Shell
from tests.report.conftest import Make, event, train


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
    assert "all 4 steps are made" in texts(root)
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


def test_what_a_run_says_is_text_and_never_markup(make: Make) -> None:
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


def test_several_runs_are_overlaid_and_their_configurations_compared(shell: Shell, make: Make, tmp_path: Path) -> None:
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


def test_a_run_that_is_named_twice_is_shown_once_and_that_is_said(
    shell: Shell, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_samples_that_are_left_out_are_counted(make: Make) -> None:
    rows = [train(100), *(event(step, "sample", "Once") for step in range(1, 17))]
    root = parsed(page([read_history(make("a", rows), "a")]))
    assert len(list(root.iter("details"))) == 12
    assert "12 of 16, evenly spread." in texts(root)
    assert "evenly" not in texts(parsed(page([read_history(make("b"), "b")])))


def test_pauses_and_lost_steps_are_no_time(make: Make) -> None:
    history = read_history(make("a"), "a")
    assert history.elapsed(train(50)["time"]) == 50
    assert history.elapsed(train(60)["time"]) == 60
    assert history.points("train/loss", 100).x["tokens"][-1] == 6400


def test_resumes_and_skipped_steps_are_marked_on_every_axis(make: Make) -> None:
    rows = [train(step, **({"train/skipped_steps": 2.0} if step == 30 else {})) for step in range(10, 101, 10)]
    root = parsed(page([read_history(make("a", rows), "a")]))
    for over in ("step", "tokens", "time"):
        titles = [title.text for title in drawings(root, over)["Loss"].iter("title")]
        assert "a: resumed from step 50 on second" in titles
        assert "a: 2 skipped up to step 30" in titles


def test_nan_and_a_run_that_has_only_begun_leave_gaps_and_no_errors(make: Make) -> None:
    rows = [train(1, **{"train/loss": None, "nonfinite": {"train/loss": "nan"}}), train(2)]
    assert read_history(make("a", rows), "a").points("train/loss", 100).y == [2.5]
    parsed(page([read_history(make("b", rows[:1]), "b")]))
    parsed(page([read_history(make("c", []), "c")]))


def test_thinning_keeps_peaks_ends_and_order() -> None:
    values = [math.sin(index / 500) for index in range(50_000)]
    values[31_337] = 9.0
    values[7] = -9.0
    kept = thin(values, 600)
    assert len(kept) <= 602
    assert {0, 7, 31_337, 49_999} <= set(kept)
    assert kept == sorted(kept)


def test_ticks_are_round_and_inside() -> None:
    assert Range(0.0, 103.0, 0, 1).ticks() == [0, 50, 100]
    assert Range(0.2, 0.31, 0, 1).ticks() == pytest.approx([0.2, 0.25, 0.3])
    assert Range(0.004, 70.0, 0, 1, log=True).ticks() == pytest.approx([0.01, 0.1, 1, 10])
    assert Range(0.9, 12.0, 0, 1, log=True).ticks() == pytest.approx([1, 2, 5, 10])
    assert Range(2.1, 4.9, 0, 1, log=True).ticks() == pytest.approx([3, 4])


def test_the_start_of_a_loss_may_run_off_the_top_so_that_the_rest_is_seen() -> None:
    line = Line("loss", range(100), [100.0, 50.0, *[2.0 + 1 / index for index in range(1, 99)]], 0)
    low, high = Drawing("t", [line], settles=True, id="i")._ranges()[1].low, 3.0
    assert Drawing("t", [line], settles=True, id="i")._ranges()[1].high < high
    assert Drawing("t", [line], id="i")._ranges()[1].high > 100
    assert low < 2.01


def test_a_report_of_no_run_exits_4_and_an_unwritable_place_2(shell: Shell, make: Make, tmp_path: Path) -> None:
    missing = shell("report", str(tmp_path / "nowhere"))
    assert (missing.code, missing.err.count("\n")) == (4, 1)
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
