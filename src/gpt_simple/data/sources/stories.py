"""Short stories for children from a seeded grammar whose entropy is known exactly.

A story is a list of sentences. Each sentence is one of a few templates. A slot of a template is filled by an even
choice among the words of its kind that the story has not used yet, and keeps its word for the rest of the story: names,
animals and things come back, so that attention has something to copy. Every choice, the number of sentences included,
shows in the text in one way only. So the probability of a text is the product of those of its choices, and minus its
logarithm is a floor that no model's loss can go below except by chance.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache

from attrs import define, field, frozen

from gpt_simple.config.schema import DataConfig
from gpt_simple.data.sources import Document

VERSION = 1
"""Part of the fingerprint: raised with every change of the stories."""

DOCUMENTS = 20_000


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


GIRLS = _words("Anna Bella Clara Daisy Ella Fern Grace Hazel Iris June Kate Lily Mia Nora Olive Pam")
BOYS = _words("Adam Ben Carl Dan Eric Finn George Hugo Ivan Jack Ken Leo Max Ned Oscar Paul")

WORDS: dict[str, tuple[str, ...]] = {
    "name": GIRLS + BOYS,
    "animal": _words("bear cat dog duck fox frog goat hen horse lamb lion mouse pig rabbit tiger wolf"),
    "trait": _words("brave clever funny gentle happy kind lazy little lonely noisy proud quick quiet shy strong tiny"),
    "color": _words("black blue brown gold green gray pink purple red silver white yellow"),
    "toy": _words(
        "ball bell boat book box cup drum flute hat kite lamp map puppet ring rope scarf sled spoon top wagon"
    ),
    "place": _words("barn beach bridge cave farm field forest garden hill lake market meadow mill park river tower"),
    "spot": _words("basket bed bench bush chair cart door gate log rug shed stone table tree wall well"),
    "food": _words("berries bread cake carrots cheese cherries cookies honey jam milk nuts pears pie plums rice soup"),
    "number": _words("two three four five six seven eight nine ten twelve"),
    "friends": _words("ants bees birds butterflies crabs deer fish geese kittens moths owls sheep snails swans"),
    "weather": _words("cold cloudy foggy hot rainy snowy sunny warm windy"),
    "verb": _words("cried danced hummed jumped laughed nodded sang shouted sighed smiled waved whispered"),
}

Templates = tuple[str, ...]

OPENING: Templates = (
    "Once there was a {trait1} {animal1} called {name1}.",
    "{name1} was a {trait1} {animal1}.",
    "Near the {place1} lived {name1}, a {trait1} {animal1}.",
)
BELONGING: Templates = (
    "{name1} had a {color1} {toy1}.",
    "{name1} loved {his} {color1} {toy1}.",
    "Every day {name1} played with a {color1} {toy1}.",
)
LOSS: Templates = (
    "One {weather1} day {name1} lost the {toy1}.",
    "On a {weather1} morning the {toy1} was gone, and {name1} {verb}.",
)
MEETING: Templates = (
    "{He} asked {name2} the {animal2} for help.",
    "{name2} the {animal2} came by to help {name1}.",
)
SEARCH: Templates = (
    "{name1} looked under the {spot} and found only a {toy}.",
    "{name2} looked behind the {spot} and saw only {friends}.",
)
FINDING: Templates = (
    'Then {name2} {verb}, "Your {toy1} is at the {place2}!" So {name1} and {name2} ran to the {place2}.',
    "At last {name2} found the {color1} {toy1} under the {spot}.",
)
JOURNEY: Templates = (
    "One {weather1} day {name1} walked to the {place2} with the {toy1}.",
    "{name1} took the {color1} {toy1} to the {place2}.",
)
COUNTING: Templates = (
    "There {he} saw {number1} {friends1}.",
    "{Number1} {friends1} were playing there.",
)
SHARING: Templates = (
    "{name1} gave them {food1}, and all {number1} {friends1} {verb}.",
    'The {friends1} {verb}. "We want {food1}," they said, so {name1} gave them {food1}.',
)
GIFT: Templates = (
    "{name2} the {animal2} had no {toy1}, so {name1} gave {name2} the {color1} {toy1}.",
    '"What a nice {color1} {toy1}!" said {name2} the {animal2}. "You can have it," said {name1}.',
)
THANKS: Templates = (
    "{name2} {verb} and gave {name1} some {food1}. The {food1} made {name1} less {trait1}.",
    '"Thank you, {name1}," said {name2}. So {name1} and {name2} ate {food1} at the {place2}.',
)
ENDING: Templates = (
    "{name1} was not {trait1} any more.",
    "{name1} {verb} and went home with {food}.",
    "That night {name1} the {animal1} dreamed of {food}.",
    "The end.",
)

MOST_SEARCHES = 3

Pick = Callable[[Sequence[str]], str]
Write = Callable[[str], None]


def generate(pick: Pick, write: Write) -> None:
    """Generate a story: every choice is one call of ``pick``, and each piece of text goes to ``write`` when chosen."""
    story = _Story(pick, write)
    story.add(OPENING, BELONGING)
    plot = pick(("loss", "journey", "gift"))
    if plot == "loss":
        story.add(LOSS, MEETING)
        for _ in range(MOST_SEARCHES):
            if pick(("find", "search")) == "find":
                break
            story.add(SEARCH)
        story.add(FINDING)
    elif plot == "journey":
        story.add(JOURNEY, COUNTING, SHARING)
    else:
        story.add(GIFT, THANKS)
    story.add(ENDING)


@cache
def _parse(template: str) -> list[str]:
    """Text and the names of slots in turns."""
    return re.split(r"\{(\w+)\}", template)


@define
class _Story:
    """The words of one story so far: ``{kind1}`` keeps its word, ``{kind}`` takes a new one, ``{Kind1}`` is capital."""

    pick: Pick
    write: Write
    kept: dict[str, str] = field(factory=dict)
    used: dict[str, list[str]] = field(factory=dict)

    def add(self, *sentences: Templates) -> None:
        """Write one template of each of these sentences."""
        for templates in sentences:
            if self.kept:
                self.write(" ")
            first, *rest = _parse(self.pick(templates))
            self.write(first)
            for slot, text in zip(rest[::2], rest[1::2], strict=True):
                name = slot.lower()
                word = self.kept.get(name) or self._new_word(name)
                self.write(word if slot == name else word.capitalize())
                self.write(text)

    def _new_word(self, name: str) -> str:
        kind = name.rstrip("12")
        words, used = WORDS[kind], self.used.setdefault(kind, [])
        word = self.pick([word for word in words if word not in used] if used else words)
        used.append(word)
        if name != kind:
            self.kept[name] = word
        if name == "name1":
            self.kept |= {"he": "she", "his": "her"} if word in GIRLS else {"he": "he", "his": "his"}
        return word


@frozen
class Stories:
    """``count`` stories. Each is an independent draw, and its number, not its text, decides whether it is held out."""

    seed: int
    count: int

    def fingerprint(self) -> str:
        return f"stories {VERSION}, seed {self.seed}, {self.count} documents"

    def documents(self) -> Iterator[Document]:
        # random() alone is documented to give the same numbers in every version of Python.
        draw = random.Random(self.seed).random
        log = [0.0, *map(math.log, range(1, 100))]
        nats = 0.0

        def pick(options: Sequence[str]) -> str:
            nonlocal nats
            count = len(options)
            nats += log[count]
            return options[int(draw() * count)]

        for number in range(self.count):
            parts: list[str] = []
            nats = 0.0
            generate(pick, parts.append)
            yield Document("".join(parts), key=f"story {number}", nats=nats)


def build(config: DataConfig, seed: int) -> Stories:
    """``data.max_documents`` stories; 20,000 if it is unset."""
    return Stories(seed, config.max_documents or DOCUMENTS)
