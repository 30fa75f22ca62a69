"""Samples text from the model after each evaluation, to show what its loss means.

Sampling has its own random numbers and runs in eval mode, so it does not change training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt
from attrs import frozen
from typing_extensions import Doc

from gpt_simple.hooks import Plugin, hookimpl

if TYPE_CHECKING:
    from gpt_simple.hooks import Run
    from gpt_simple.hooks import events as ev


@frozen
class SampleConfig:
    """``[plugins.sample]``."""

    prompts: Annotated[tuple[str, ...], Doc("texts to continue; an empty one starts a new document")] = ("",)
    max_new_tokens: Annotated[int, Ge(1), Doc("tokens to write for each prompt")] = 80
    temperature: Annotated[float, Gt(0), Doc("below 1 plays safe, above 1 dares")] = 0.8
    top_k: Annotated[int, Ge(1), Doc("choose among this many likeliest tokens")] = 50
    seed: Annotated[int, Ge(0), Doc("seed of the samples")] = 0


class Sample(Plugin[SampleConfig]):
    """Runs on the main process, or on all of them if each has a part of the model."""

    Config = SampleConfig
    ranks = "all"
    on_error = "disable"

    def __init__(self, config: SampleConfig) -> None:
        super().__init__(config)
        self._texts: list[str] = []

    @hookimpl
    def on_eval_end(self, run: Run, event: ev.EvalEnd) -> None:
        if not run.is_main and run.facts()["parallel"] != "fsdp":
            return
        config = self.config
        self._texts = []
        for index, prompt in enumerate(config.prompts):
            text = run.generate(
                prompt,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                seed=config.seed + index,
            )
            self._texts.append(text)
            run.log.info(text, name="sample", prompt=prompt, index=index)

    def describe(self) -> dict[str, Any]:
        return {"sample": "\n".join(self._texts)} if self._texts else {}
