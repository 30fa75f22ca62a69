"""A program for the null GPU: on this card, steps and an evaluation of the engine for each width of heads.

    python -m tests.nullgpu.heads '{"heads": [64, 128], "compiled": [64]}'

One layer and two heads, with and without a document mask. ``compiled``: the widths with which it is compiled, too.
"""

from __future__ import annotations

import json
import sys

import torch

from tests.nullgpu.steps import config, prepared


def trains(head: int, *, masked: bool, compiled: bool) -> str:
    """Empty if heads of this width train, else the error."""
    torch._dynamo.reset()  # else flex attention would run as it is written from the ninth width on
    shape = {"layers": 1, "rows": 1, "length": 256, "n_embd": 2 * head, "n_head": 2}
    try:
        run = prepared(config(**shape, documents=masked, compile=compiled, checkpointing=False))
        run.step()
        run.evaluate()
        torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    asked = json.loads(sys.argv[1])
    cases = [(head, masked, False) for head in asked["heads"] for masked in (False, True)]
    cases += [(head, masked, True) for head in asked["compiled"] for masked in (False, True)]
    names = {True: "document mask", False: "plain"}
    answer = {
        f"{head}, {names[masked]}{', compiled' * compiled}": trains(head, masked=masked, compiled=compiled)
        for head, masked, compiled in cases
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
