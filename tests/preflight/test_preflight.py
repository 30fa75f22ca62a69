"""The plain command: what it finds, how it says so, and that it leaves no trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_simple import Config, Finding, Plugin, Run, hookimpl
from gpt_simple.hooks import NoConfig, Preflight
from tests.cli.test_bad_input import snapshot
from tests.conftest import CONFIG, Shell
from tests.preflight.conftest import Check

PLUGIN = """
from gpt_simple import Finding, Plugin, hookimpl

class Picky(Plugin):
    @hookimpl
    def check_config(self, config):
        return [Finding("{severity}", "odd-steps", "max_steps is even", "training.max_steps", exit_code=3)]
"""


def test_a_good_configuration_has_no_errors_and_changes_nothing(shell: Shell, here: Path) -> None:
    before = snapshot(here)
    ended = shell("validate", "config.toml")
    assert ended.code == 0
    assert "0 errors, 0 warnings" in ended.out
    assert "starts from scratch" in ended.out
    assert snapshot(here) == before


COMPONENTS = """
from gpt_simple import Plugin, hookimpl

class Parts(Plugin):
    @classmethod
    @hookimpl
    def register_components(cls, registry):
        for kind in ("model", "optimizer", "schedule", "tokenizer", "source"):
            registry.add(kind, "lost", "nowhere:build")
"""


@pytest.mark.parametrize("key", ["model.name", "optimizer.name", "optimizer.schedule", "data.tokenizer", "data.source"])
def test_a_component_that_fails_to_import_is_its_plugins_error(
    check: Check, shell: Shell, here: Path, key: str
) -> None:
    (here / "parts.py").write_text(COMPONENTS)
    arguments = ("-p", "./parts.py", f"--{key}", "lost")
    (error,) = (finding for finding in check(*arguments, code=5).values() if finding["severity"] == "error")
    assert f"of the plugin parts ({here / 'parts.py'}) could not be imported: ModuleNotFoundError" in error["message"]
    assert shell("run", "config.toml", *arguments, "--force").code == 5
    assert not (here / "out").exists()


def test_it_imports_no_torch(here: Path) -> None:
    code = (
        "import sys\nfrom gpt_simple.cli.main import main\ntry: main(['validate', 'config.toml'])\n"
        "except SystemExit: pass\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "key"),
    [
        (["--optimizer.warmup_steps", "4"], "warmup-beyond-run", "optimizer.warmup_steps"),
        (["--optimizer.warmup_steps", "3"], "warmup-long", "optimizer.warmup_steps"),
        (["--optimizer.decay_steps=9", "--optimizer.warmup_steps=3"], "decay-beyond-run", "optimizer.decay_steps"),
        (["--optimizer.decay_steps=9", "--optimizer.warmup_steps=1"], "decay-beyond-run", "optimizer.decay_steps"),
        (["--training.warmup_stages=[{steps=4}]"], "warmup-stages-beyond-run", "training.warmup_stages"),
        (["--training.eval_steps", "5"], "interval-beyond-run", "training.eval_steps"),
        (["--training.keep_milestone_every", "3"], "milestones-missed", "training.keep_milestone_every"),
        (["--optimizer.learning_rate", "1.5"], "learning-rate-high", "optimizer.learning_rate"),
        (["--training.resume=scratch", "--training.max_runtime_seconds=99"], "stops-for-good", "training.resume"),
        (["--model.rope_scaling_type", "ntk"], "without-effect", "model.rope_scaling_type"),
        (["--model.position=learned", "--model.rope_base=1e6"], "without-effect", "model.rope_base"),
        (["--data.path", "."], "without-effect", "data.path"),
        (["--data.format", "text"], "without-effect", "data.format"),
    ],
)
def test_what_runs_but_surprises_is_a_warning_with_its_place(
    check: Check, arguments: list[str], code: str, key: str
) -> None:
    finding = check(*arguments)[code]
    assert finding["severity"] == "warning"
    assert key in finding["place"]
    assert check(*arguments, "--strict", code=2)[code]["severity"] == "warning"


def test_a_place_is_a_line_of_the_file(check: Check, here: Path) -> None:
    (here / "config.toml").write_text(CONFIG.replace("warmup_steps = 1", "warmup_steps = 100"))
    line = 1 + CONFIG.splitlines().index("warmup_steps = 1")
    assert check()["warmup-beyond-run"]["place"] == f"config.toml:{line} (optimizer.warmup_steps)"


def test_a_default_interval_beyond_a_short_run_is_no_surprise(check: Check, here: Path) -> None:
    (here / "config.toml").write_text(CONFIG.replace("eval_steps = 4\nsave_steps = 2\n", ""))
    assert "interval-beyond-run" not in check()


def test_all_mistakes_of_a_configuration_are_findings(check: Check, shell: Shell, here: Path) -> None:
    (here / "config.toml").write_text(CONFIG.replace("max_steps", "max_step").replace("n_layer", "n_layers"))
    ended = shell("validate", "config.toml")
    assert ended.code == 2
    assert "config.toml:3" in ended.out
    assert "config.toml:13" in ended.out
    assert "2 errors" in ended.out
    assert check(code=2)["config"]["severity"] == "error"


def test_a_mistake_has_its_place_and_hint_apart(shell: Shell, here: Path) -> None:
    (here / "config.toml").write_text(CONFIG.replace("n_layer = 1", "n_layers = 1").replace("n_head = 2", "n_head = 5"))
    ended = shell("validate", "config.toml", "--json", "--training.seed=x", "--data.tokenizer=bytez")
    findings = json.loads(ended.out)["findings"]
    assert [(f["place"], f["message"].split(",")[0]) for f in findings] == [
        ("config.toml:2 (model.n_embd), config.toml:4 (model.n_head)", "n_embd 32 is not a multiple of n_head 5"),
        ("config.toml:3 (model.n_layers)", "unknown key"),
        ("--training.seed", "expected an integer >= 0"),
        ("--data.tokenizer", "there is no tokenizer 'bytez' (did you mean 'bytes'?)"),
    ]
    assert findings[1]["hint"] == "did you mean model.n_layer?"


def test_information_has_no_exit_code(check: Check) -> None:
    assert {finding["exit_code"] for finding in check().values() if finding["severity"] == "info"} == {0}


@pytest.mark.parametrize("arguments", [["config.toml", "--bogus"], [], ["config.toml", "--training.seed"]])
def test_a_mistake_in_the_options_is_json_too(shell: Shell, arguments: list[str]) -> None:
    ended = shell("validate", "--json", *arguments)
    assert ended.code == 2
    (finding,) = json.loads(ended.out)["findings"]
    assert (finding["code"], finding["severity"]) == ("usage", "error")
    assert ended.err == ""


def test_a_check_of_a_plugin_counts_like_any_other(check: Check, here: Path) -> None:
    (here / "picky.py").write_text(PLUGIN.format(severity="error"))
    assert check("-p", "./picky.py", code=3)["odd-steps"]["place"] == "config.toml:13 (training.max_steps)"
    (here / "picky.py").write_text(PLUGIN.format(severity="warning"))
    found = check("-p", "./picky.py")
    assert found["odd-steps"]["severity"] == "warning"
    assert {"validate", "picky"} <= found["plugins"]["fields"]["plugins"].keys()
    check("-p", "./picky.py", "--strict", code=3)


def test_a_secret_is_never_printed(shell: Shell, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-k3y")
    ended = shell("validate", "config.toml", "--training.wandb_project=stories", "--json")
    assert "s3cr3t-k3y" not in ended.out + ended.err
    assert "wandb" in ended.out


class Curious(Plugin):  # type: ignore[type-arg]
    """Sees what a check is given."""

    @hookimpl
    def check_config(self, config: Config, preflight: Preflight) -> list[Finding]:
        assert preflight.options.launching
        assert preflight.config is config
        return [Finding("error", "seen", f"registry {preflight.registry.names('model')}", "model.n_embd", exit_code=3)]


def test_an_error_at_start_ends_the_run_before_it_writes(tmp_path: Path) -> None:
    import gpt_simple

    with pytest.raises(gpt_simple.GptSimpleError, match=r"model\.n_embd.*registry \['gpt'\]") as caught:
        gpt_simple.train(training={"output_dir": str(tmp_path / "out")}, plugins=[Curious])
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_the_number_of_processes_multiplies_the_tokens(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check("--world-size", "8")["config"]["fields"]["tokens_per_step"] == 8 * 64
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert check()["config"]["fields"]["tokens_per_step"] == 2 * 64


def test_the_stages_of_a_warm_up_are_named(check: Check) -> None:
    stages = "[{steps = 1, gradient_accumulation_steps = 3, length = 8}, {steps = 2, length = 16}, {steps = 9}]"
    found = check(f"--training.warmup_stages={stages}")
    assert found["config"]["message"] == (
        "4 steps, 1 to 1 of 192 tokens (24 rows of 8), 2 to 3 of 64 tokens (4 rows of 16), 4 to 4 of 64 tokens"
        " (2 rows of 32): 384 tokens"
    )
    assert [stage["tokens"] for stage in found["config"]["fields"]["stages"]] == [192, 64, 64]
    warning = found["warmup-stages-beyond-run"]["message"]
    assert warning == "the warm-up stages last 12 steps, and max_steps is 4: the run ends in stage 3 of 3"
    assert "warmup-stages-beyond-run" not in check("--training.warmup_stages=[{steps = 3}]")


def test_without_its_checks_the_command_does_not_claim_success(check: Check) -> None:
    assert "nothing but" in check("-p", "no:validate")["unchecked"]["message"]
    check("-p", "no:validate", "--strict", code=2)


def test_the_plugins_are_those_of_the_run(check: Check) -> None:
    assert "memory" not in check("--memory")["plugins"]["fields"]["plugins"]
    assert "memory" in check("--memory", "--plugins.memory={}")["plugins"]["fields"]["plugins"]


class Watches(Plugin[NoConfig]):
    """Sees the data before and after they are prepared."""

    def __init__(self) -> None:
        super().__init__(NoConfig())
        self.prepared: list[bool] = []

    @hookimpl
    def check_config(self, config: Config, preflight: Preflight) -> list[Finding]:
        self.prepared.append(not preflight.data.estimated)
        return []

    @hookimpl
    def check_runtime(self, run: Run, preflight: Preflight) -> list[Finding]:
        self.prepared.append(not preflight.data.estimated)
        return []


def test_a_preflight_of_the_runtime_finds_the_data_prepared(here: Path) -> None:
    import gpt_simple

    gpt_simple.train("config.toml", plugins=[watches := Watches()])
    assert watches.prepared == [False, True]


class Exacting(Plugin):  # type: ignore[type-arg]
    """Finds something once the devices are known."""

    on_error = "abort"

    @hookimpl
    def check_runtime(self, run: Run, preflight: Preflight) -> list[Finding]:
        return [Finding("error", "odd", "too many", "training.max_steps")]


def test_what_is_found_on_the_device_has_its_place_too(here: Path) -> None:
    import gpt_simple

    with pytest.raises(gpt_simple.GptSimpleError, match=r"config\.toml:13 \(training\.max_steps\): too many"):
        gpt_simple.train("config.toml", plugins=[Exacting])
