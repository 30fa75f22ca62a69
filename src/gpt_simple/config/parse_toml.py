"""TOML text -> values and the line of every key, with hints for habits from other formats.

The values come from tomli. It reports only the first error, so a slip whose meaning is plain (``True``,
``None``, ``.5``, text without quotes) is noted, mended in memory, and reading goes on to find the next one.
"""

from __future__ import annotations

import re
from typing import Any

import tomli
from attrs import frozen

from gpt_simple.config.mistakes import short, show
from gpt_simple.config.origin import join
from gpt_simple.config.parsed import Parsed, SyntaxMistake
from gpt_simple.config.secret import is_secret

_MOST_REPAIRS = 100
_WORD = re.compile(r"[^,\]}#\n]*")
_NUMBER = re.compile(r"([+-]?)(\d[\d_]*)?(\.?)(\d[\d_]*)?([eE][+-]?\d+)?")


def parse_toml(text: str) -> Parsed:
    """Values and lines of a TOML document, with the slips that could be mended."""
    text = text.replace("\r\n", "\n")  # tomli counts positions in a text like that
    mistakes: list[SyntaxMistake] = []
    for _ in range(_MOST_REPAIRS):
        try:
            values = tomli.loads(text)
        except tomli.TOMLDecodeError as error:
            repair = _mend(text, error)
            mistake = repair.mistake if repair else _opened_twice(text, error) or _at(error, _first_lower(error.msg))
            if repair and _names_a_secret(text, error):
                mistake = _at(error, "expected one value in quotes", hint="what is there is not shown")
            mistakes.append(mistake)
            if repair is None:
                break
            text = repair.text
        except ValueError as error:  # a number with thousands of digits
            mistakes.append(SyntaxMistake(0, 0, _first_lower(str(error))))
            break
        else:
            return Parsed(values, _Scanner(text).scan(), tuple(mistakes))
    return Parsed(None, {}, tuple(mistakes))


def _names_a_secret(text: str, error: tomli.TOMLDecodeError) -> bool:
    """Whether the line with the mistake sets a key whose value is not for everybody's eyes."""
    table = re.findall(r"^\s*\[+([^\]\n]*)", text[: error.pos], re.MULTILINE)[-1:]
    keys = re.findall(r"""(?<![\w.-])([\w.-]+)["']?\s*[=:]""", _line_of(text, error))
    return any(is_secret(".".join([*table, key])) for key in keys)


def _at(error: tomli.TOMLDecodeError, message: str, key: str = "", hint: str = "") -> SyntaxMistake:
    return SyntaxMistake(error.lineno, error.colno, message, key, hint)


@frozen
class _Repair:
    mistake: SyntaxMistake
    text: str


def _mend(text: str, error: tomli.TOMLDecodeError) -> _Repair | None:
    """What the user probably meant at the place of the error, if that is plain."""
    start = error.pos
    if error.msg == "Cannot overwrite a value":
        return _with_line(text, _given_twice(text, error))
    if error.msg.startswith("Expected '=' after a key"):
        found = re.match(r"\s*([\w.-]+)\s*:\s*(.*)", _line_of(text, error))
        if found is None:
            return None
        if not found[2]:
            return _with_line(text, _at(error, f"write [{found[1]}]"), f"[{found[1]}]")
        return _with_line(text, _at(error, short(f"write {found[1]} = {found[2]}")))
    if error.msg.startswith("Expected newline"):
        while start and text[start - 1] not in " \t=,[{\n":
            start -= 1
        if start == error.pos:
            return _without_the_rest(text, error)
    elif error.msg != "Invalid value":
        return None
    found = _WORD.match(text, start)
    word = found[0].strip() if found else ""
    if start != error.pos and not (word and _NUMBER.fullmatch(word)):
        return None
    message, value = _meant(word)
    if value == word:  # nothing is wrong with it but what follows
        return _without_the_rest(text, error)
    return _Repair(_at(error, message), text[:start] + value + text[start + len(word) :])


def _without_the_rest(text: str, error: tomli.TOMLDecodeError) -> _Repair | None:
    """A line with something behind its value."""
    found = re.match(r"[^#=\[]*=\s*(.*)", _line_of(text, error))
    if found is None:
        return None
    given = found[1].partition(" #")[0].strip()
    message = f"expected one value, got {short(given)}"
    return _with_line(text, _at(error, message, hint="text needs quotes, a list needs brackets"))


def _given_twice(text: str, error: tomli.TOMLDecodeError) -> SyntaxMistake:
    scanner = _Scanner(text[: error.pos])
    first = scanner.scan().get(scanner.last, error.lineno)
    if first == error.lineno:  # a value and a table of one name
        return _at(error, "this key is given twice", hint="keep one of the two")
    return _at(error, f"given twice, first on line {first}", scanner.last, "keep one of the two")


def _opened_twice(text: str, error: tomli.TOMLDecodeError) -> SyntaxMistake | None:
    """The mistake of a second ``[table]``; None if the error is another one."""
    if not error.msg.startswith("Cannot declare"):
        return None
    lines = text.split("\n")
    header = re.match(r"\s*\[([\w.-]+)\]", lines[error.lineno - 1])
    if header is None:
        return None
    first = _Scanner("\n".join(lines[: error.lineno - 1])).scan().get(header[1])
    place = f" on line {first}" if first else ""
    return _at(error, f"[{header[1]}] is there already{place}", hint="put its keys together")


def _meant(word: str) -> tuple[str, str]:
    """What to write instead of a value that TOML does not know, and a value to read on with."""
    if word.lower() in ("true", "yes", "on"):
        return f"write true, not {word}", "true"
    if word.lower() in ("false", "no", "off"):
        return f"write false, not {word}", "false"
    if word.lower() in ("null", "none", "nil", "~"):
        return f'TOML has no {word}: leave the key out or write "null"', '"null"'
    number = _NUMBER.fullmatch(word)
    if number and (number[2] or number[4]):
        sign, whole, dot, fraction, exponent = (part or "" for part in number.groups())
        value = f"{sign}{whole.lstrip('0_') or '0'}{dot and '.' + (fraction or '0')}{exponent}"
        return f"write {short(value)}, not {short(word)}", value
    if not word:
        return "a value is missing after the =", '""'
    return f"text needs quotes: {show(word)}", '""'


def _with_line(text: str, mistake: SyntaxMistake, line: str = "") -> _Repair:
    """The text with another line in the place of the one with the mistake, by default an empty one."""
    lines = text.split("\n")
    lines[mistake.line - 1] = line
    return _Repair(mistake, "\n".join(lines))


def _line_of(text: str, error: tomli.TOMLDecodeError) -> str:
    return text.split("\n")[error.lineno - 1]


def _first_lower(message: str) -> str:
    return message[:1].lower() + message[1:]


class _Scanner:
    """Finds the line of every key in a document that tomli has accepted; it checks nothing itself."""

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
    value: Any = tomli.loads(f'key = "{basic}"')["key"] if "\\" in basic else basic
    return str(value)
