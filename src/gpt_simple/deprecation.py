"""Names that still work and will be removed."""

from __future__ import annotations

import warnings


def warn_deprecated(name: str, *, removal: str, instead: str, stacklevel: int = 1) -> None:
    """Issue a DeprecationWarning at the line that uses ``name``.

    ``removal`` is the first version without it. With ``stacklevel`` 1 the warning points at the caller of the
    deprecated function, or at the import of the deprecated module; with 2, at the caller of that caller.
    """
    message = f"{name} is deprecated and will be removed in version {removal}: use {instead}"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel + 2)
