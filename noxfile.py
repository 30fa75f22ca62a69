"""What is checked, and how: ``nox -s tests`` is what a change must pass; the other sessions are parts and extras."""

from __future__ import annotations

import os

import nox

nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = ("-c", "constraints.txt")


def _install(session: nox.Session, *extras: str) -> None:
    session.install(*CONSTRAINTS, "-e", f".[{','.join(extras)}]")


@nox.session
def tests(session: nox.Session) -> None:
    """Style, types, the import rules, and all tests that take seconds."""
    _install(session, "dev", "test")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")
    session.run("pytest", "-m", "not slow", "-n", "2", *session.posargs, env=_one_thread())


@nox.session
def slow(session: nox.Session) -> None:
    """Tests that take minutes: long fault injection, generated code, the quickstart as a newcomer runs it."""
    _install(session, "test")
    session.run("pytest", "-m", "slow", "-n", "2", *session.posargs, env=_one_thread())


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types alone."""
    _install(session, "dev", "test")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Ratios against bare PyTorch in the same process; nothing here is pass or fail."""
    _install(session)
    for script in sorted(os.listdir("benchmarks")):
        if script.endswith(".py"):
            session.run("python", os.path.join("benchmarks", script), *session.posargs)


def _one_thread() -> dict[str, str]:
    """Two test processes on two cores: more threads each would only fight."""
    return {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
