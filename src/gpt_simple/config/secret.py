"""What must not be shown: values under a key such as ``api_key``, ``token`` or ``webhook_url``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

HIDDEN = "(redacted)"
_SECRET = re.compile(
    r"(?:^|[_.])(?:token|secret|password|passwd|passphrase|credentials?|auth|authorization|webhook|"
    r"(?:api|access|private|secret)_?key)(?:$|[_.\[])",
    re.IGNORECASE,
)


def is_secret(path: str) -> bool:
    """Whether a dotted path names a secret, or something in a table of secrets; ``tokenizer`` and ``text_key`` do not.

    A plugin's own name says nothing of what its table holds.
    """
    return _SECRET.search(re.sub(r"^plugins\.\w+", "", path)) is not None


def secrets_in(values: Any, path: str = "") -> Iterator[str]:
    """Every text under a key of a secret."""
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
