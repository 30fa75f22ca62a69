"""The floor of the stories: the grammar is inverted from the text alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest

from gpt_simple.data.sources.stories import WORDS, Stories, generate


class _Fork(Exception):
    """A choice that the script does not cover, and among how many."""

    def __init__(self, width: int) -> None:
        self.width = width


class _Mismatch(Exception):
    """The generated text is not the given one."""


def parses(text: str) -> list[float]:
    """The nats of every way in which the grammar generates exactly this text, found by trying all choices.

    A script is a list of choices; it is extended in every way at the first choice it does not cover, and dropped as
    soon as its text differs from the given one. Neither ``random`` nor what the source recorded plays a part.
    """
    found: list[float] = []
    scripts: list[tuple[int, ...]] = [()]
    while scripts:
        script = scripts.pop()
        replay = _Replay(text, script)
        try:
            generate(replay.pick, replay.write)
        except _Fork as fork:
            scripts += [(*script, choice) for choice in range(fork.width)]
        except _Mismatch:
            continue
        else:
            found += [-math.log(replay.probability)] * (replay.position == len(text))
    return found


class _Replay:
    def __init__(self, text: str, script: tuple[int, ...]) -> None:
        self.text, self.script = text, script
        self.position, self.step, self.probability = 0, 0, 1.0

    def pick(self, options: Sequence[str]) -> str:
        if self.step == len(self.script):
            raise _Fork(len(options))
        self.step += 1
        self.probability /= len(options)
        return options[self.script[self.step - 1]]

    def write(self, part: str) -> None:
        if not self.text.startswith(part, self.position):
            raise _Mismatch
        self.position += len(part)


def test_every_text_has_one_parse_of_the_recorded_probability() -> None:
    for story in Stories(seed=11, count=60).documents():
        assert parses(story.text) == [pytest.approx(story.nats, rel=1e-12)]


@pytest.mark.parametrize("change", [("a ", "an "), (".", "!"), ("", " ")])
def test_text_outside_the_grammar_has_no_parse(change: tuple[str, str]) -> None:
    (story,) = Stories(seed=3, count=1).documents()
    assert parses(story.text.replace(*change, 1)) == []


def test_ending_early_is_another_text() -> None:
    (story,) = Stories(seed=3, count=1).documents()
    assert parses(story.text[: story.text.rindex(". ") + 1]) == []


def test_choices_are_even() -> None:
    opened = Counter(
        word for story in Stories(seed=5, count=4000).documents() for word in story.text.split(".")[0].split()
    )
    counts = [opened[name] + opened[f"{name},"] for name in WORDS["name"]]
    expected = 4000 / len(counts)
    assert sum((count - expected) ** 2 / expected for count in counts) < 66  # 31 degrees of freedom: 0.9997


def test_stories_repeat_their_words_and_read_like_stories() -> None:
    for story in Stories(seed=1, count=50).documents():
        words = Counter(story.text.replace(".", " ").replace(",", " ").split())
        assert max(words[name] for name in WORDS["name"]) >= 3
        assert "{" not in story.text
        assert "  " not in story.text
        assert not any(f" a {vowel}" in story.text for vowel in "aeiou")
        assert story.text[0].isupper()
        assert story.text[-1] in '."'


def test_stories_are_the_same_in_every_version_of_python() -> None:
    (story,) = Stories(seed=42, count=1).documents()
    assert story.text == PINNED
    assert Stories(seed=42, count=1).fingerprint() != Stories(seed=43, count=1).fingerprint()


PINNED = (
    "Anna was a happy duck. Every day Anna played with a red spoon. One cold day Anna lost the spoon. "
    "She asked Adam the bear for help. At last Adam found the red spoon under the log. Anna was not happy any more."
)
