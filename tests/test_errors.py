"""An error holds problems, which are rendered as text where they are shown."""

from __future__ import annotations

import pickle

import pytest

from gpt_simple.errors import CheckpointError, ConfigError, DataError, Problem, raise_all


@pytest.mark.parametrize(
    ("problem", "place", "text"),
    [
        (Problem(None, "", "it is late"), "", "it is late"),
        (Problem(None, "data.path", "lost", "find it"), "data.path", "data.path: lost; find it"),
        (Problem("c.toml:3", "data.path", "lost"), "c.toml:3 (data.path)", "c.toml:3: data.path: lost"),
        (Problem("--data.path", "data.path", "lost"), "--data.path", "--data.path: lost"),
        (Problem("$WORLD_SIZE", "", "no number").within("process 2"), "process 2: $WORLD_SIZE", "process 2: $WORLD"),
    ],
)
def test_a_problem_has_a_place_and_a_line(problem: Problem, place: str, text: str) -> None:
    assert problem.place == place
    assert str(problem).startswith(text)


def test_an_error_is_raised_with_a_text_or_with_what_is_known() -> None:
    assert ConfigError("too small").problems == (Problem(None, "", "too small"),)
    known = ConfigError("too small", key="plugins.csv.size", hint="write 5", exit_code=7)
    assert known.problems == (Problem(None, "plugins.csv.size", "too small", "write 5"),)
    assert (known.exit_code, ConfigError.exit_code) == (7, 2)


class Own(DataError):
    """A plugin's error, with a constructor of its own."""

    def __init__(self, path: str) -> None:
        self.path = path


def test_an_error_of_a_plugin_needs_no_problems() -> None:
    assert str(Own("a.txt")) == "a.txt"


def test_an_error_crosses_processes_with_what_was_added_to_it() -> None:
    error = DataError("lost", key="data.path", exit_code=7)
    error.replace_problems(problem._replace(location="c.toml:3") for problem in error.problems)
    sent = pickle.loads(pickle.dumps(error))
    assert (sent.problems, sent.exit_code) == (error.problems, 7)


def test_errors_are_merged_into_the_worst_without_repetition() -> None:
    errors = [ConfigError("a", key="x.y"), CheckpointError("b"), ConfigError("a", key="x.y"), DataError("a\nb")]
    with pytest.raises(CheckpointError) as caught:
        raise_all(errors)
    assert [problem.message for problem in caught.value.problems] == ["a", "b", "a\nb"]
    assert str(caught.value) == "x.y: a\nb\na\nb"
    raise_all([])
