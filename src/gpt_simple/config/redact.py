"""Secrets: values under a key such as ``api_key``, ``token`` or ``webhook_url``. No message or report shows them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gpt_simple.config.frozen import json_value
from gpt_simple.errors import GptSimpleError

if TYPE_CHECKING:
    from gpt_simple.config.schema import Config

HIDDEN = "(redacted)"
_SECRET = re.compile(
    r"(?:^|[_.])(?:token|secret|password|passwd|passphrase|credentials?|auth|authorization|webhook|"
    r"(?:api|access|private|secret)_?key)(?:$|[_.\[])",
    re.IGNORECASE,
)
_PASSWORD_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
_WORD = 4
"""A shorter secret is hidden only where it stands alone: elsewhere it is a part of words."""
_IN_ENVIRONMENT = 8
"""A shorter variable is a switch, not a secret."""


def redacted(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as JSON values in the shape of a file, without its secrets.

    Hidden are texts under a key such as ``api_key``, ``token`` or ``webhook_url``, and user and password in a URL.
    ``tokenizer`` and ``text_key`` are no secrets.
    """
    result: dict[str, Any] = _redact("", json_value(config))
    return result


def _redact(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        # A value in a table of secrets is a secret, whatever its own key.
        return {name: _redact(key if is_secret(key) else name.rpartition(".")[2], item) for name, item in value.items()}
    if isinstance(value, list):
        return [_redact(key, item) for item in value]
    if isinstance(value, str) and value:
        return HIDDEN if is_secret(key) else _PASSWORD_IN_URL.sub(f"{HIDDEN}@", value)
    return value


def is_secret(path: str) -> bool:
    """Whether a dotted path names a secret, or a value in a table of secrets; ``tokenizer`` and ``text_key`` do not.

    The name of a plugin does not make its table secret.
    """
    return _SECRET.search(re.sub(r"^plugins\.\w+", "", path)) is not None


def secrets_in(values: Any, path: str = "") -> Iterator[str]:
    """Every text and number under a secret's key, as text."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from secrets_in(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from secrets_in(value, path)
    elif isinstance(values, str | int | float) and not isinstance(values, bool) and values and is_secret(path):
        yield str(values)


def secrets_of_environment(environ: Mapping[str, str]) -> Iterator[str]:
    """The values of variables such as ``WANDB_API_KEY``, which errors of libraries may hold. A path is no secret."""
    for value in secrets_in(dict(environ)):
        if len(value) >= _IN_ENVIRONMENT and not value.startswith("/"):
            yield value


def spellings(secrets: Iterable[str]) -> list[str]:
    """The secrets, and each as messages quote it: as a Python or JSON string, and in a URL."""
    from urllib.parse import quote

    found: set[str] = set()
    for secret in secrets:
        found |= {secret, repr(secret)[1:-1], json.dumps(secret)[1:-1], quote(secret, safe="", errors="replace")}
    return sorted(found, key=lambda secret: (-len(secret), secret))


def without(text: str, secrets: Iterable[str]) -> str:
    """The text with each of the secrets hidden, and without passwords in URLs."""
    for secret in sorted(secrets, key=len, reverse=True):
        alone = rf"(?<!\w){re.escape(secret)}(?!\w)"
        text = text.replace(secret, HIDDEN) if len(secret) >= _WORD else re.sub(alone, HIDDEN, text)
    return _PASSWORD_IN_URL.sub(f"{HIDDEN}@", text)


def all_without(value: Any, secrets: Sequence[str]) -> Any:
    """The value with the secrets hidden in each of its texts; an exception becomes its text."""
    if isinstance(value, str | BaseException):
        return without(str(value), secrets)
    if isinstance(value, Mapping):
        return {key: all_without(item, secrets) for key, item in value.items()}
    return [all_without(item, secrets) for item in value] if isinstance(value, list | tuple) else value


def hide_in_error(error: BaseException, secrets: Sequence[str]) -> None:
    """Hide the secrets in the texts of an error, of its causes and of its notes: a traceback shows all of them."""
    found: list[BaseException] = []
    following: list[BaseException | None] = [error]
    while following:
        one = following.pop()
        if one is None or one in found:
            continue
        found.append(one)
        following += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
        if isinstance(one, GptSimpleError):
            hidden = (
                p._replace(message=without(p.message, secrets), hint=without(p.hint, secrets)) for p in one.problems
            )
            one.replace_problems(hidden)
            continue
        one.args = tuple(without(arg, secrets) if isinstance(arg, str) else arg for arg in one.args)
        if isinstance(one, OSError) and isinstance(one.strerror, str):
            one.strerror = without(one.strerror, secrets)
        if notes := getattr(one, "__notes__", None):
            notes[:] = all_without(notes, secrets)
