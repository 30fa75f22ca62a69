"""TOML text -> values and the line of every key, with hints for habits from other formats.

The values come from tomli, which reports the first error and stops there.
"""

from __future__ import annotations

import re

import tomli

from gpt_simple.config.mistakes import config_error, file_error, short, show
from gpt_simple.config.origin import Origin, join
from gpt_simple.config.parsed import Parsed
from gpt_simple.config.redact import is_secret
from gpt_simple.errors import Problem

_NUMBER = re.compile(r"([+-]?)(\d[\d_]*)?(\.?)(\d[\d_]*)?([eE][+-]?\d+)?")


def parse_toml(text: str, file: str) -> Parsed:
    """Values and lines of a TOML document. The first error in its text is a ConfigError."""
    text = text.replace("\r\n", "\n")  # tomli does the same before it counts positions
    try:
        values, scanner = tomli.loads(text), _Scanner(text)
        return Parsed(values, scanner.scan(), typed=scanner.typed)
    except tomli.TOMLDecodeError as error:
        found = _explained(text, error) or Problem(None, "", _first_lower(error.msg))
        origin = Origin.in_file(file, error.lineno, error.colno)
        raise config_error([origin.mistake(found.key, found.message, found.hint)]) from None
    except ValueError as error:  # a number with thousands of digits
        raise file_error(file, _first_lower(str(error))) from None


def _explained(text: str, error: tomli.TOMLDecodeError) -> Problem | None:
    """The error as what the user probably meant, if that is plain. The value of a secret is not shown."""
    line = text.split("\n")[error.lineno - 1]
    if error.msg == "Cannot overwrite a value":
        return _given_twice(text, error)
    if error.msg.startswith("Cannot declare"):
        return _opened_twice(text, line, error)
    found = _not_a_pair(line) if error.msg.startswith("Expected '='") else _not_a_value(text, line, error)
    table = re.findall(r"^\s*\[+([^\]\n]*)", text[: error.pos], re.MULTILINE)[-1:]
    keys = re.findall(r"""(?<![\w.-])([\w.-]+)["']?\s*[=:]""", line)
    if found and any(is_secret(".".join([*table, key])) for key in keys):
        return Problem(None, "", "expected one value in quotes", "the value is a secret and is not shown")
    return found


def _given_twice(text: str, error: tomli.TOMLDecodeError) -> Problem:
    scanner = _Scanner(text[: error.pos])
    first = scanner.scan().get(scanner.last, error.lineno)
    if first == error.lineno:  # a value and a table of one name
        return Problem(None, "", "this key is given twice", "keep one of the two")
    return Problem(None, scanner.last, f"given twice, first on line {first}", "keep one of the two")


def _opened_twice(text: str, line: str, error: tomli.TOMLDecodeError) -> Problem | None:
    if (header := re.match(r"\s*\[([\w.-]+)\]", line)) is None:
        return None
    before = "\n".join(text.split("\n")[: error.lineno - 1])
    first = _Scanner(before).scan().get(header[1])
    place = f" on line {first}" if first else ""
    return Problem(None, "", f"[{header[1]}] is there already{place}", "put its keys together")


def _not_a_pair(line: str) -> Problem | None:
    if (found := re.match(r"\s*([\w.-]+)\s*:\s*(.*)", line)) is None:
        return None
    return Problem(None, "", short(f"write {found[1]} = {found[2]}") if found[2] else f"write [{found[1]}]")


def _not_a_value(text: str, line: str, error: tomli.TOMLDecodeError) -> Problem | None:
    start = error.pos
    if error.msg.startswith("Expected newline"):
        while start and text[start - 1] not in " \t=,[{\n":
            start -= 1
    elif error.msg != "Invalid value":
        return None
    word = re.split(r"[,\]}#\n]", text[start:], maxsplit=1)[0].strip()
    is_cut = start != error.pos  # tomli has read the beginning of the word: the 00 of 007
    if is_cut and not (word and _NUMBER.fullmatch(word)):
        return None
    if (is_cut or error.msg == "Invalid value") and (message := _meant(word)):
        return Problem(None, "", message)
    if (found := re.match(r"[^#=\[]*=\s*(.*)", line)) is None:
        return None
    given = found[1].partition(" #")[0].strip()
    return Problem(None, "", f"expected one value, got {short(given)}", "text needs quotes, a list needs brackets")


def _meant(word: str) -> str:
    """What to write instead of a word that is no value of TOML; empty for a value."""
    if word.lower() in ("true", "yes", "on"):
        return "" if word == "true" else f"write true, not {word}"
    if word.lower() in ("false", "no", "off"):
        return "" if word == "false" else f"write false, not {word}"
    if word.lower() in ("null", "none", "nil", "~"):
        return f'TOML has no {word}: leave the key out or write "null"'
    number = _NUMBER.fullmatch(word)
    if number and (number[2] or number[4]):
        sign, whole, dot, fraction, exponent = (part or "" for part in number.groups())
        value = f"{sign}{whole.lstrip('0_') or '0'}{dot and '.' + (fraction or '0')}{exponent}"
        text = f", or {show(word)} for text" if whole.startswith("0") else ""
        return "" if value == word else f"write {short(value)}, not {short(word)}{text}"
    return f"text needs quotes: {show(word)}" if word else "a value is missing after the ="


def _first_lower(message: str) -> str:
    return message[:1].lower() + message[1:]


class _Scanner:
    """Finds the line of every key in a document that tomli has accepted. It checks nothing itself."""

    _BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
    _KEY_PART = re.compile(r"""[ \t]*(?:"((?:[^"\\\n]|\\.)*)"|'([^'\n]*)'|([A-Za-z0-9_-]+))[ \t]*""")
    _STRING = re.compile(
        r'"""(?:[^\\]|\\.)*?"{3,5}|'
        r"'''.*?'{3,5}|"
        r'"(?:[^"\\\n]|\\.)*"|'
        r"'[^'\n]*'",
        re.DOTALL,
    )
    _BARE = re.compile(r"[^,\]}#\n]*")

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.lines: dict[str, int] = {}
        self.typed: dict[str, str] = {}
        self.array_lengths: dict[str, int] = {}
        self.last = ""

    def scan(self) -> dict[str, int]:
        """Dotted path -> line, for tables, keys and list items."""
        table = ""
        while self._skip_blank():
            if self._take("[["):
                table = self._header()
                item = self.array_lengths.get(table, 0)
                self.array_lengths[table] = item + 1
                self.lines.setdefault(table, self._line())
                table = join(table, item)
                self.lines[table] = self._line()
                self.position += 2
            elif self._take("["):
                table = self._header()
                self.lines.setdefault(table, self._line())
                self.position += 1
            else:
                self._pair(table)
        return self.lines

    def _pair(self, table: str) -> None:
        line = self._line()
        path = table
        for part in self._key():
            path = join(path, part)
            self.lines.setdefault(path, line)
        self.position += 1
        self._value(path)
        self.last = path

    def _value(self, path: str) -> None:
        self._skip_blank()
        if string := self._STRING.match(self.text, self.position):
            self.position = string.end()
        elif self._take("["):
            item = 0
            while self._skip_blank() and not self._take("]"):
                self.lines[join(path, item)] = self._line()
                self._value(join(path, item))
                self._skip_blank()
                self._take(",")
                item += 1
        elif self._take("{"):
            while self._skip_blank() and not self._take("}"):
                self._pair(path)
                self._skip_blank()
                self._take(",")
        elif bare := self._BARE.match(self.text, self.position):
            self.position = bare.end()
            self.typed[path] = bare[0].strip()

    def _header(self) -> str:
        path = ""
        for part in self._key():
            length = self.array_lengths.get(path)
            path = join(path if length is None else join(path, length - 1), part)
        return path

    def _key(self) -> list[str]:
        parts = []
        while found := self._KEY_PART.match(self.text, self.position):
            self.position = found.end()
            basic, literal, bare = found.groups()
            parts.append(_unescaped(basic) if basic is not None else literal if literal is not None else bare)
            if not self._take("."):
                break
        return parts

    def _skip_blank(self) -> bool:
        """Move to the next token; False at the end of the text."""
        blank = self._BLANK.match(self.text, self.position)
        self.position = blank.end() if blank else self.position
        return self.position < len(self.text)

    def _take(self, token: str) -> bool:
        taken = self.text.startswith(token, self.position)
        self.position += len(token) if taken else 0
        return taken

    def _line(self) -> int:
        return self.text.count("\n", 0, self.position) + 1


def _unescaped(basic: str) -> str:
    return str(tomli.loads(f'key = "{basic}"')["key"])
