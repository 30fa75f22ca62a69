"""Which blocks a run computes again in the backward pass, and why."""

from __future__ import annotations

from attrs import evolve, frozen

from gpt_simple.config.schema import Config

KEY = "training.gradient_checkpointing"
CONFIGURED, _UNDECIDED = "configured", "auto: not decided"


@frozen
class ActivationCheckpointing:
    """``setting``: true, false or every k-th block. ``limit``: the peak in bytes up to which ``"auto"`` means false.

    ``limit`` is None where no peak was compared.
    """

    setting: bool | int
    why: str
    limit: int | None = None

    @classmethod
    def of(cls, config: Config, kept: bool | int | None = None) -> ActivationCheckpointing:
        """As configured. ``"auto"`` is ``kept``, the setting of the run that is resumed; without one, true for now.

        With ``training.activation_memory_budget``, ``"auto"`` is false: the compiler recomputes.
        """
        training = config.training
        setting = training.gradient_checkpointing
        if not isinstance(setting, str):
            return cls(setting, CONFIGURED)
        if training.activation_memory_budget is not None:
            return cls(False, f"auto: activation_memory_budget {training.activation_memory_budget:g} is set")
        return cls(True, _UNDECIDED) if kept is None else cls(kept, "auto: as the run began")

    @property
    def is_undecided(self) -> bool:
        """Whether it is ``"auto"`` in a run that begins, before anything was compared."""
        return self.why == _UNDECIDED

    def applied(self, config: Config) -> Config:
        """``config`` with this setting."""
        return evolve(config, training=evolve(config.training, gradient_checkpointing=self.setting))
