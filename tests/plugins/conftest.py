"""The tiny run of the engine's tests, and the command line."""

from __future__ import annotations

from tests.engine.conftest import tiny

__all__ = ["tiny"]
