"""Generate text with a trained model: ``gpt-simple sample RUN --prompt TEXT``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gpt_simple.cli.fields import complete_plugin
from gpt_simple.cli.options import Number
from gpt_simple.cli.paths import PATH
from gpt_simple.cli.terminal import announced, echo
from gpt_simple.machine_failures import explained_machine_failures, is_of_machine

if TYPE_CHECKING:
    import torch

_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {*map(ord, "\n\t")}, "\ufffd")
"""A model early in training writes control characters, which must not reach a terminal or a file."""


@click.command()
@click.argument("run", type=PATH)
@click.option("--prompt", default="", help="Text to continue; unset: a new document.")
@click.option("--tokens", default=200, show_default=True, type=click.IntRange(1), help="Tokens to write at most.")
@click.option("--temperature", default=0.8, show_default=True, type=Number(0), help="0: the likeliest token.")
@click.option("--top-k", type=click.IntRange(1), help="Choose among this many likeliest tokens.")
@click.option(
    "--top-p",
    type=Number(0, 1, min_open=True),
    help="Choose among the fewest tokens that together hold this probability.",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), help="The same seed, the same text."
)
@click.option("--count", default=1, show_default=True, type=click.IntRange(1), help="Texts, with seeds from --seed on.")
@click.option("--step", type=click.IntRange(1), help="The checkpoint of this step; unset: the newest.")
@click.option(
    "--weights",
    help="live, or a set that a plugin keeps, such as ema; unset: those that the run's evaluations had.",
)
@click.option(
    "-p",
    "plugins",
    multiple=True,
    metavar="NAME",
    shell_complete=complete_plugin,
    help="Switch a plugin on, the file that brings the model: NAME, ./file.py.",
)
@click.option("--device", help="For example cpu or cuda:1; unset: a GPU if there is one.")
@explained_machine_failures(lambda on_device: "a run may be using it: try --device cpu" if on_device else "")
def sample(
    run: Path,
    prompt: str,
    tokens: int,
    seed: int,
    count: int,
    step: int | None,
    weights: str | None,
    plugins: tuple[str, ...],
    device: str | None,
    **sampling: Any,
) -> None:
    """Print text from the model of the run in directory RUN, the prompt included.

    RUN may also be the directory of one checkpoint, RUN/checkpoints/step-00001000.
    """
    run, step = _run_and_step(run, step)
    # Only now: a mistake in the options is reported without the seconds that torch takes to load.
    with announced("loading PyTorch and the model, which then writes"):
        import torch

        from gpt_simple.engine.precision import resolve
        from gpt_simple.job.model import restore
        from gpt_simple.model.generate import generate
        from gpt_simple.run_dir.layout import RunDir

        torch_device = _device(device)
        model, tokenizer = restore(RunDir(run), torch_device, step=step, weights=weights, plugins=plugins)
    for index in range(count):
        with torch.no_grad(), resolve(None, torch_device).autocast():
            text = generate(model, tokenizer, prompt, max_new_tokens=tokens, seed=seed + index, **sampling)
        echo(("\n" if index else "") + text.translate(_CONTROLS))


def _run_and_step(path: Path, step: int | None) -> tuple[Path, int | None]:
    """The directory of the run, and the step if ``path`` is a checkpoint of it."""
    absolute = path.absolute()
    named = re.fullmatch(r"step-(\d+)", absolute.name)
    if named is None or absolute.parent.name != "checkpoints":
        return path, step
    if step not in (None, int(named[1])):
        raise click.UsageError(
            f"{path} is the checkpoint of step {int(named[1])}, and --step says {step}: leave one out"
        )
    return path.parent.parent if len(path.parts) > 2 else absolute.parent.parent, int(named[1])


def _device(name: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        if is_of_machine(error):
            raise
        raise click.UsageError(f"--device {name}: {str(error).partition(chr(10))[0]}") from error
    return device
