"""A configuration as it may leave the machine: for a tracking service or a report that is passed around."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gpt_simple.config.render import plain
from gpt_simple.config.schema import Config
from gpt_simple.config.secret import HIDDEN, is_secret

_PASSWORD_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


def redacted(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as JSON values in the shape of a file, without its secrets.

    Hidden are texts under a key such as ``api_key``, ``token`` or ``webhook_url``, and user and password in a URL.
    ``tokenizer`` and ``text_key`` are no secrets.
    """
    result: dict[str, Any] = _redact("", plain(config))
    return result


def _redact(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _redact(_under(key, name), item) for name, item in value.items()}
    if isinstance(value, list):
        return [_redact(key, item) for item in value]
    if isinstance(value, str) and value:
        return HIDDEN if is_secret(key) else _PASSWORD_IN_URL.sub(f"{HIDDEN}@", value)
    return value


def _under(parent: str, name: str) -> str:
    """The key to judge a value by: what stands in a table of secrets is one, whatever its own key."""
    own = name.rpartition(".")[2]
    return parent if is_secret(parent) else own
