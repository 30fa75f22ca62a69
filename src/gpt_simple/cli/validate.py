"""Tell whether a run would work, without starting it."""

from __future__ import annotations

from typing import Any

import click

from gpt_simple.cli.fields import ConfiguredCommand, pass_overrides, plugins_option
from gpt_simple.errors import ConfigError, ExitCode, GptSimpleError
from gpt_simple.hooks.preflight import PreflightOptions
from gpt_simple.hooks.results import Finding
from gpt_simple.plugin_host.activation import Switches
from gpt_simple.preflight.findings import exit_code, from_error, to_json, to_table
from gpt_simple.preflight.preflight import RunPreflight
from gpt_simple.spec import try_resolve


class _Validate(ConfiguredCommand):
    """Tells a mistake in its own options as JSON too, if that is asked for."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        as_json = "--json" in args
        try:
            return super().make_context(info_name, args, parent, **extra)
        except (click.UsageError, ConfigError) as error:
            if not as_json:
                raise
            raise _told(error) from error


@click.command(cls=_Validate, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("path", metavar="[CONFIG]", type=click.Path(), required=False)
@click.option("-c", "--config", "option", metavar="FILE", type=click.Path(), help="The same as CONFIG.")
@plugins_option("As for `run`.")
@click.option("--no-plugins", is_flag=True, help="As for `run`.")
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
@click.option("--probe", is_flag=True, help="Make some real steps on this machine and tell how long the run takes.")
@click.option("--mfu", type=click.FloatRange(0, 1, min_open=True), default=0.4, help="Assumed without --probe.")
@click.option("--strict", is_flag=True, help="Warnings count as errors.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@pass_overrides
def validate(
    overrides: list[tuple[str, str]],
    path: str | None,
    option: str | None,
    plugins: tuple[str, ...],
    no_plugins: bool,
    force: bool,
    world_size: int,
    memory: bool,
    device: str | None,
    fit: bool,
    probe: bool,
    mfu: float,
    strict: bool,
    as_json: bool,
) -> int:
    """Check CONFIG, its data, what it would resume, its output and this machine. Nothing is changed.

    Exit code 0 without errors, else that of the worst: 2 configuration, 3 data, 4 checkpoint, 5 plugin.
    """
    problem = ""
    if path and option and path != option:
        problem = f"two configurations were given: {path} and --config {option}"
    elif not (path or option or overrides):
        problem = "a configuration is missing: gpt-simple validate config.toml"
    mistake = click.UsageError(problem)
    if problem:
        raise _told(mistake) if as_json else mistake
    memory = memory or fit or device is not None
    options = PreflightOptions(
        force=force,
        world_size=world_size,
        memory=memory,
        device=device,
        fit=fit,
        probe=probe,
        mfu=mfu,
    )
    switches = Switches.parse((*plugins, *(["memory"] if memory else [])), no_plugins=no_plugins)
    findings: list[Finding] = []
    try:
        spec, errors = try_resolve(path or option, overrides=overrides, switches=switches)
        for error in errors:
            findings += from_error(error)
        if spec is not None:
            from gpt_simple.engine.resume import keep_values_of_run

            spec = keep_values_of_run(spec, force=force)
            findings += [Finding("warning", "note", note) for note in (*spec.notes, *spec.host.notes)]
            findings += spec.check_config(RunPreflight(spec, options))
            if "validate" not in (plugin.name for plugin in spec.host.plugins):
                message = "the plugin validate is off: nothing but the configuration's own values was checked"
                findings.append(Finding("warning", "unchecked", message, hint="leave out what switches it off"))
    except GptSimpleError as error:
        findings += from_error(error)
    code = exit_code(findings, strict=strict)
    click.echo(to_json(findings, code) if as_json else to_table(findings))
    return code


def _told(error: click.UsageError | ConfigError) -> click.exceptions.Exit:
    """How to leave after a mistake in the options was told as JSON."""
    if isinstance(error, click.UsageError):
        error = ConfigError(error.format_message())
    findings = Finding.of_error(error, "usage")
    click.echo(to_json(findings, ExitCode.CONFIG))
    return click.exceptions.Exit(ExitCode.CONFIG)
