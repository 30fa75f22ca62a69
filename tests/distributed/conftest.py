"""Several processes, as in tests/launch, and models sharded over them."""

from __future__ import annotations

from tests.launch.conftest import ranks

__all__ = ["ranks"]
