"""A program for the null GPU: which heads flex attention is chosen for on this card, and which of them it fits.

    python -m tests.nullgpu.flex '{"heads": [64, 128], "force": false}'

Triton compiles for the card's capability and compares with its shared memory, as on a real one. ``force``: try heads
for which flex attention is not chosen, too.
"""

from __future__ import annotations

import json
import sys

import torch

from gpt_simple.engine import precision
from gpt_simple.model import documents


def fits(head: int, dtype: torch.dtype) -> str:
    """Empty if forward and backward compile and start for heads of this size, else the error."""
    device = torch.device("cuda", 0)
    q, k, v = (torch.randn(2, 4, 512, head, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = documents.block_mask(torch.zeros(2, 512, dtype=torch.int64, device=device))
    try:
        documents.flex(q, k, v, mask).sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    asked = json.loads(sys.argv[1])
    setting = precision.resolve(None, torch.device("cuda", 0))
    dtype = setting.dtype or torch.float32
    answer = {}
    for head in asked["heads"]:
        kernel = documents.document_kernel(torch.device("cuda", 0), dtype, head, 0.0)
        tried = kernel == "flex" or asked["force"]
        answer[str(head)] = {"kernel": kernel, "error": fits(head, dtype) if tried else ""}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
