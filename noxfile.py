"""Checks: ``nox -s tests`` is what a change must pass. The other sessions are parts of it and extras."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = ("-c", "constraints.txt")
WALK = "tests/docs/test_plugin_pages.py::test_the_tutorial_works_as_it_is_written"


def _install(session: nox.Session, *extras: str) -> None:
    session.install(*CONSTRAINTS, "-e", f".[{','.join(extras)}]" if extras else ".")


def _static(session: nox.Session) -> None:
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")
    session.run("towncrier", "build", "--draft", "--version", "next", silent=True)


@nox.session
def tests(session: nox.Session) -> None:
    """Style, types, the import rules, and all fast tests."""
    _install(session, "dev", "test")
    _static(session)
    session.run("pytest", "-m", "not slow", "-n", "2", *session.posargs)


@nox.session(python=["3.11", "3.12", "3.13"])
def pythons(session: nox.Session) -> None:
    """All fast tests on each supported Python that is installed."""
    _install(session, "test")
    session.run("pytest", "-m", "not slow", "-n", "2", *session.posargs)


@nox.session
def coverage(session: nox.Session) -> None:
    """Branch coverage of the fast tests, including the processes that they start or fork."""
    _install(session, "dev", "test")
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", "-m", "not slow", "-n", "2", *session.posargs)
    session.run("coverage", "combine", "--quiet")
    session.run("coverage", "report")


@nox.session
def slow(session: nox.Session) -> None:
    """Tests that take minutes: long fault injection, the quickstart in a fresh clone."""
    _install(session, "test")
    session.run("pytest", "-m", "slow", "--deselect", WALK, *session.posargs)


@nox.session
def walk(session: nox.Session) -> None:
    """The tutorial as it is written: from an empty directory to an installed plugin with its tests and runs."""
    _install(session, "test")
    session.run("pytest", WALK, *session.posargs)


@nox.session
def browser(session: nox.Session) -> None:
    """The report in headless Chromium (from the system: chromium, chromium-driver); screenshots in build/report."""
    _install(session, "test")
    session.run("pytest", "tests/report", *session.posargs, env={"REPORT_SCREENSHOTS": "build/report"})


@nox.session
def lint(session: nox.Session) -> None:
    """Style and types only."""
    _install(session, "dev", "test")
    _static(session)


@nox.session
def plugins(session: nox.Session) -> None:
    """Each package in plugins/ by itself, against the built wheel of the core."""
    session.install("build", "hatchling")
    dist = Path(session.create_tmp())
    session.run("python", "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), silent=True)
    wheel = max(dist.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    session.install(*CONSTRAINTS, "--force-reinstall", "--no-deps", str(wheel))
    session.install(*CONSTRAINTS, f"{wheel}[testing]")
    for package in sorted(Path("plugins").iterdir()):
        session.install(*CONSTRAINTS, "--no-build-isolation", f"./{package}[test]")
        session.run("pytest", "-c", os.devnull, "--rootdir", str(package), str(package / "tests"))
        session.run("pip", "uninstall", "--yes", "--quiet", package.name)


@nox.session
def nullgpu(session: nox.Session) -> None:
    """The CUDA path on a GPU that does nothing, with the CUDA build of torch in an environment of its own (6 GB)."""
    session.install("torch", "-e", ".[test]")  # without the constraints, whose torch may be a CPU build
    session.run("python", "-c", "import sys, torch; sys.exit(torch.version.cuda is None and 'no CUDA build of torch')")
    session.run("pytest", "tests/nullgpu", "--timeout", "1200", *session.posargs)


@nox.session
@nox.parametrize("version", ["oldest", "newest"])
def torch(session: nox.Session, version: str) -> None:
    """What computes, on the oldest torch that pyproject.toml allows or the newest that pip finds."""
    needs = nox.project.load_toml()["project"]["dependencies"]
    bound = next(need.removeprefix("torch>=") for need in needs if need.startswith("torch>="))
    session.install("--upgrade", f"torch=={bound}.*" if version == "oldest" else "torch", "-e", ".[test]")
    session.run("python", "-c", "import torch; print('torch', torch.__version__)")
    folders = (f"tests/{name}" for name in ("model", "engine", "checkpoint", "launch", "job", "compatibility"))
    session.run("pytest", "-m", "not slow", "-n", "2", *folders, *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """The tests that need a GPU, for those who have one, with the newest torch in an environment of its own (6 GB)."""
    if not (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()):
        session.skip("this machine has no GPU (neither nvidia-smi nor /dev/nvidia0 nor /dev/kfd)")
    session.install("torch", "-e", ".[test]")
    seen = "import torch; print(torch.cuda.is_available(), torch.__version__)"
    is_usable, version = str(session.run("python", "-c", seen, silent=True)).split()[-2:]
    if is_usable != "True":
        session.skip(f"torch {version} cannot use the GPU of this machine: see docs/hardware.md")
    session.run("pytest", "-m", "gpu", *session.posargs)


@nox.session
def schema(session: nox.Session) -> None:
    """The JSON Schema in real linters: the example files pass, a wrong one does not."""
    _install(session)
    session.install("tombi", "check-jsonschema")
    directory = Path(session.create_tmp()).resolve()
    schema = session.run("gpt-simple", "config", "schema", silent=True)
    (directory / "schema.json").write_text(str(schema))
    for preset in ("tiny", "small", "medium", "large"):
        for suffix in (".toml", ".yaml"):
            session.run("gpt-simple", "init", "--preset", preset, "-o", str(directory / f"{preset}{suffix}"), "--force")
    for example in Path("examples").glob("*.toml"):
        (directory / example.name).write_text(example.read_text())
    for path in directory.glob("*.toml"):
        path.write_text(f"#:schema ./schema.json\n{path.read_text()}")
    session.run("tombi", "lint", "--offline", *map(str, sorted(directory.glob("*.toml"))))
    (directory / "wrong.toml").write_text("#:schema ./schema.json\n[training]\nmax_step = 5\n")
    session.run("tombi", "lint", "--offline", str(directory / "wrong.toml"), success_codes=[1])
    (directory / "wrong.toml").unlink()
    check = ("check-jsonschema", "--schemafile", str(directory / "schema.json"))
    session.run(*check, *map(str, sorted(directory.glob("*.yaml"))))
    (directory / "wrong.yaml").write_text("training:\n  max_step: 5\n")
    session.run(*check, str(directory / "wrong.yaml"), success_codes=[1])
    (directory / "wrong.yaml").unlink()


@nox.session
def benchmarks(session: nox.Session) -> None:
    """Run the benchmark scripts. Nothing here passes or fails."""
    _install(session)
    scripts = sorted(Path("benchmarks").glob("*.py"))
    for script in (script for script in scripts if script.name != "gpu.py"):
        session.run("python", str(script), *session.posargs)
