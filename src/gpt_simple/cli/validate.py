"""Say whether a run would work, without starting it."""

from __future__ import annotations

from typing import Any

import click
from attrs import evolve

from gpt_simple.cli.fields import ConfigRequest, ConfiguredCommand
from gpt_simple.cli.options import Number
from gpt_simple.cli.terminal import announced, echo
from gpt_simple.errors import ConfigError, ExitCode, GptSimpleError
from gpt_simple.hooks.preflight import PreflightOptions
from gpt_simple.hooks.results import Finding
from gpt_simple.preflight.findings import exit_code, from_error, to_json, to_table
from gpt_simple.preflight.preflight import RunPreflight
from gpt_simple.spec import try_resolve


class _Validate(ConfiguredCommand):
    """With ``--json``, a mistake in the command's own options is JSON too."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(context, args)
        except (click.UsageError, ConfigError) as error:
            if "--json" not in args:
                raise
            usage = ConfigError(error.format_message()) if isinstance(error, click.UsageError) else error
            echo(to_json(Finding.of_error(usage, "usage"), ExitCode.CONFIG))
            context.exit(ExitCode.CONFIG)


@click.command(cls=_Validate, config_required=True)
@click.option("--force", is_flag=True, help="As if the run were started with --force.")
@click.option(
    "--world-size",
    type=click.IntRange(1),
    envvar="WORLD_SIZE",
    default=1,
    help="Processes of the run; by default $WORLD_SIZE, else 1.",
)
@click.option("--memory", is_flag=True, help="Predict the peak of memory, without using it.")
@click.option(
    "--device", metavar="NAME|BYTES", help="Compare with a card: h100, a100-40, ..., 24GiB. Implies --memory."
)
@click.option("--fit", is_flag=True, help="Find the largest per_device_batch_size that fits. Implies --memory.")
@click.option("--probe", is_flag=True, help="Make some real steps on this machine and say how long the run takes.")
@click.option("--mfu", type=Number(0, 1, min_open=True), default=0.4, help="Assumed without --probe.")
@click.option("--strict", is_flag=True, help="Warnings count as errors.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def validate(request: ConfigRequest, strict: bool, as_json: bool, **options: Any) -> int:
    """Check CONFIG, its data, the checkpoint to resume, the output directory and this machine. Nothing is changed.

    Exit code 0 without errors, else that of the worst: 2 configuration, 3 data, 4 checkpoint, 5 plugin.
    """
    if options["fit"] or options["device"] is not None:
        options["memory"] = True
    if options["memory"]:
        request = evolve(request, plugins=(*request.plugins, "memory"))
    with announced("checking the configuration, the data and this machine"):
        findings = _findings(request, options)
    code = exit_code(findings, strict=strict)
    echo(to_json(findings, code) if as_json else to_table(findings))
    return code


def _findings(request: ConfigRequest, options: dict[str, Any]) -> list[Finding]:
    """What the configuration, its plugins and their checks report."""
    findings: list[Finding] = []
    try:
        spec, errors = try_resolve(request.path, overrides=request.overrides, switches=request.switches)
        for error in errors:
            findings += from_error(error)
        if spec is not None:
            from gpt_simple.engine.compatibility import keep_values_of_run

            spec = keep_values_of_run(spec, force=options["force"])
            findings += [Finding("warning", "note", note) for note in (*spec.notes, *spec.host.notes)]
            findings += spec.check_config(RunPreflight(spec, PreflightOptions(**options)))
            if "validate" not in (plugin.name for plugin in spec.host.plugins):
                message = "the plugin validate is off: nothing but the configuration's own values was checked"
                findings.append(Finding("warning", "unchecked", message, hint="leave out what switches it off"))
    except GptSimpleError as error:
        findings += from_error(error)
    return findings
