"""Builds the null GPU and starts programs on it.

    python -m tests.nullgpu.device [--card t4] [--gib 8] [--count 2] PROGRAM ARGUMENT...

starts any program of this environment, for example ``gpt-simple run config.toml``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import frozen

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Unavailable(Exception):
    """There is no null GPU here; says why."""


@frozen
class Card:
    """What a program sees of a GPU. The limits of shared memory are those of NVIDIA's CUDA programming guide."""

    name: str
    capability: int
    shared_bytes: int
    """Shared memory that one block may have."""
    gib: float


CARDS = {
    "t4": Card("Tesla T4", 75, 65536, 14.5),
    "a100": Card("NVIDIA A100-SXM4-80GB", 80, 166912, 79),
    "a10g": Card("NVIDIA A10G", 86, 101376, 22),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", 89, 101376, 23.5),
    "h100": Card("NVIDIA H100 80GB HBM3", 90, 232448, 79),
    "rtx5090": Card("NVIDIA GeForce RTX 5090", 120, 101376, 31.5),
}


@frozen
class NullGpu:
    """A library, and in ``caches`` the generated kernels. Never share these with a real GPU: what they were tuned by is
    a constant time."""

    library: Path
    caches: Path

    @classmethod
    def build(cls, folder: Path) -> NullGpu:
        """Compile the library, unless ``folder`` has it. Raises Unavailable where it cannot work."""
        headers = _headers()
        source = HERE / "nullgpu.c"
        place = folder.resolve() / hashlib.sha256(source.read_bytes()).hexdigest()[:12]
        gpu = cls(place / "libcuda.so.1", folder.resolve())
        if not gpu.library.exists():
            place.mkdir(parents=True, exist_ok=True)
            made = place / f"made.{os.getpid()}"
            # -w: most functions ignore most of their arguments.
            flags = ("-std=gnu17", "-O2", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", f"-I{headers}")
            command = ["gcc", *flags, str(source), "-o", str(made), "-ldl", "-lpthread"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Unavailable(f"gcc could not build the null GPU: {done.stderr.strip()}")
            made.replace(gpu.library)
        return gpu

    def environment(
        self,
        card: Card = CARDS["h100"],
        *,
        count: int = 1,
        gib: float | None = None,
        log: Path | None = None,
        **variables: str,
    ) -> dict[str, str]:
        """The environment of a process that sees ``count`` of ``card``. ``log``: one line for each event, in
        ``log.PID``. Further ``variables`` are those of ``nullgpu.c`` or any others."""
        caches = {
            name: str(self.caches / f"{kind}-{card.capability}")
            for name, kind in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton"))
        }
        path = [str(HERE / "site"), str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        others = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        return {
            **others,  # the tests hide the real GPUs
            **caches,
            "LD_PRELOAD": str(self.library),
            "PYTORCH_ALLOC_CONF": "expandable_segments:False",  # the library has no virtual memory
            "TRITON_LIBCUDA_PATH": str(self.library.parent),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a compiling process would be a fork of a process with "a GPU"
            "PYTHONPATH": os.pathsep.join(path),
            "NULLGPU_NAME": card.name,
            "NULLGPU_CC": str(card.capability),
            "NULLGPU_SHARED": str(card.shared_bytes),
            "NULLGPU_GIB": str(card.gib if gib is None else gib),
            "NULLGPU_COUNT": str(count),
            **({} if log is None else {"NULLGPU_LOG": str(log)}),
            **variables,
        }

    def run(
        self, arguments: Sequence[str | Path], environment: Mapping[str, str] | None = None, *, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run Python with these arguments to its end."""
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            env=dict(environment or self.environment()),
            cwd=cwd,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=900,
        )


def _headers() -> Path:
    """CUDA's headers, which triton brings."""
    if sys.platform != "linux":
        raise Unavailable("the null GPU is made for Linux")
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("triton is not installed, whose headers the null GPU is built with")
    import torch

    if torch.version.cuda is None:
        raise Unavailable(f"torch {torch.__version__} is no CUDA build")
    if shutil.which("gcc") is None:
        raise Unavailable("gcc is missing")
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "include"


def main() -> None:
    """Replace this process by the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--count", type=int, default=1, help="how many of them (1)")
    parser.add_argument("--gib", type=float, help="memory of one, if not the card's own")
    parser.add_argument("--log", type=Path, help="write one line for each event, to LOG.PID")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "nullgpu", help="library and caches")
    parser.add_argument("program", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    if not given.program:
        parser.error("which program?")
    try:
        gpu = NullGpu.build(given.folder)
    except Unavailable as error:
        parser.error(str(error))
    environment = gpu.environment(CARDS[given.card], count=given.count, gib=given.gib, log=given.log)
    os.execvpe(given.program[0], given.program, environment)


if __name__ == "__main__":
    main()
