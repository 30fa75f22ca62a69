"""Names that still work and will be removed."""

from __future__ import annotations

import warnings


def warn_deprecated(name: str, *, removal: str, instead: str, stacklevel: int = 1) -> None:
    """Issue a DeprecationWarning at the line that uses ``name``.

    ``removal`` is the version that no longer has it. With ``stacklevel`` 1 the line is the one that called the function
    that calls this, or that imported the module whose import calls this; 2 is the caller of that one.
    """
    message = f"{name} is deprecated and will be removed in version {removal}: use {instead}"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel + 2)
