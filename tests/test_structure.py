"""Rules on the structure of the code that no linter checks."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "gpt_simple"

OF_TORCH = {"grad", "found_inf", "grad_scale"}
"""Attributes that torch's own protocol has callers assign."""


def assignments_from_outside(path: Path) -> Iterator[str]:
    """Assignments to an attribute of anything but ``self`` or a flag of torch, as ``file:line target``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if not isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.For, ast.withitem)):
            continue
        for target in targets:
            for part in ast.walk(target) if target is not None else ():
                if not isinstance(part, ast.Attribute) or not isinstance(part.ctx, ast.Store):
                    continue
                text = ast.unparse(part)
                of_self = isinstance(part.value, ast.Name) and part.value.id in ("self", "cls")
                if not of_self and not text.startswith("torch.") and part.attr not in OF_TORCH:
                    yield f"{path.relative_to(SOURCE)}:{part.lineno} {text}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            yield f"{path.relative_to(SOURCE)}:{node.lineno} setattr"


def test_no_object_is_changed_from_outside_its_class() -> None:
    """What a stage returns is complete: nothing patches it later."""
    packages = ("job", "engine", "preflight", "cli")
    files = [path for package in packages for path in (SOURCE / package).glob("*.py")]
    found = [line for path in files for line in assignments_from_outside(path)]
    assert found == []


def test_names_of_tests_have_at_most_60_characters() -> None:
    """A longer explanation is a docstring."""
    files = [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "plugins").glob("*/tests/test_*.py")]
    names = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) > 60
    ]
    assert names == []
