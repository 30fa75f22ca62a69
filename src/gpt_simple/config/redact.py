"""Secrets: values under a key such as ``api_key``, ``token`` or ``webhook_url``. No message or report shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gpt_simple.config.frozen import json_value

if TYPE_CHECKING:
    from gpt_simple.config.schema import Config

HIDDEN = "(redacted)"
_SECRET = re.compile(
    r"(?:^|[_.])(?:token|secret|password|passwd|passphrase|credentials?|auth|authorization|webhook|"
    r"(?:api|access|private|secret)_?key)(?:$|[_.\[])",
    re.IGNORECASE,
)
_PASSWORD_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


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
    """Every text under a secret's key."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from secrets_in(value, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from secrets_in(value, path)
    elif isinstance(values, str) and values and is_secret(path):
        yield values


def without(text: str, secrets: Iterable[str]) -> str:
    """The text with each of the secrets hidden."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text
