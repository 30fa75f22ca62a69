"""torch's settings inside a run, and the caller's afterwards."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import itertools
import torch
from gpt_simple.engine.process_state import preserved_process_state, _matmul_precision

for older, newer in itertools.product((None, "highest", "high", "medium"), (None, "tf32", "ieee")):
    torch.set_float32_matmul_precision(older or "highest")
    if newer:
        torch.backends.cuda.matmul.fp32_precision = newer
    before = _matmul_precision()
    with preserved_process_state():
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert _matmul_precision() == before, (older, newer, before, _matmul_precision())
"""


def test_the_precision_of_products_is_restored_from_either() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
