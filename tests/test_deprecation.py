"""Deprecated names work until the version that removes them, and warn where they are used."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.version import Version

import gpt_simple
from gpt_simple import hooks
from gpt_simple.deprecation import warn_deprecated
from gpt_simple.preflight import memory

SOURCE = Path(gpt_simple.__file__).parent


def line_of(warning: pytest.WarningsRecorder) -> str:
    """The line that all warnings point at."""
    (place,) = {(entry.filename, entry.lineno) for entry in warning}
    return Path(place[0]).read_text().splitlines()[place[1] - 1].strip()


def test_a_moved_module_warns_where_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gpt_simple.hooks.answers", raising=False)
    with pytest.warns(
        DeprecationWarning, match=r"gpt_simple.hooks.answers .* version 1.0: use gpt_simple.hooks$"
    ) as seen:
        from gpt_simple.hooks.answers import REDUCTIONS, Finding, Metric  # the line
    assert line_of(seen).endswith("# the line")
    assert (Finding, Metric, REDUCTIONS[0]) == (hooks.Finding, hooks.Metric, "mean")


def test_a_moved_name_warns_where_it_is_used() -> None:
    with pytest.warns(DeprecationWarning, match=r"gpt_simple.predict_memory .* use preflight.predict_memory") as seen:
        from gpt_simple import predict_memory  # the line
    assert line_of(seen).endswith("# the line")
    assert len(seen) == 1, "an import looks a name up twice"
    assert predict_memory is memory.predict_memory
    with pytest.warns(DeprecationWarning, match="gpt_simple.MemoryPrediction") as seen:
        assert gpt_simple.MemoryPrediction is hooks.MemoryPrediction  # the line
    assert line_of(seen).endswith("# the line")


def test_deprecated_names_are_not_listed() -> None:
    assert not {"MemoryPrediction", "predict_memory"} & {*dir(gpt_simple), *gpt_simple.__all__}


def test_stacklevel_counts_from_the_deprecated_functions_caller() -> None:
    def old(stacklevel: int) -> None:
        warn_deprecated("old", removal="1.0", instead="new", stacklevel=stacklevel)

    def outer() -> None:
        old(2)

    with pytest.warns(DeprecationWarning, match="^old is deprecated") as seen:
        old(1)  # the line
    assert line_of(seen).endswith("# the line")
    with pytest.warns(DeprecationWarning, match="^old is deprecated") as seen:
        outer()  # the outer line
    assert line_of(seen).endswith("# the outer line")


def test_what_is_due_for_removal_is_removed() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    removals = re.findall(r'removal="([^"]+)"', text)
    assert removals
    assert all(Version(gpt_simple.__version__) < Version(removal) for removal in removals)
