"""Each hook times each misbehaviour: the policy, the attribution, all other plugins called, and the same weights."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_simple import Plugin, hookimpl
from gpt_simple.errors import PluginError
from gpt_simple.hooks import HOOKS
from gpt_simple.testing import MISBEHAVIOURS, Recorder, Trained, misbehaving, train, train_on_ranks

LAST_WORDS = ("on_run_error", "on_close")
BEFORE_THE_RUN = ("register_components", "check_config")
DURING = [hook for hook in HOOKS if hook not in (*LAST_WORDS, *BEFORE_THE_RUN, "on_checkpoint_loaded", "on_log")]


# Gradients are off already where an evaluation is made.
CASES = [(hook, how) for hook in DURING for how in MISBEHAVIOURS if (hook, how) != ("evaluate", "leaves gradients off")]


def run(plugin: type[Plugin], **options: Any) -> Trained:
    """Two steps, in which every hook has its turn."""
    return train(plugin, max_steps=2, **options)


@pytest.fixture(scope="module")
def alone() -> Trained:
    """The same run with no plugin that misbehaves."""
    return train(max_steps=2)


def without_logs(recorder: Recorder) -> list[str]:
    return [hook for hook in recorder.hooks() if hook != "on_log"]


@pytest.mark.parametrize(("hook", "how"), CASES)
def test_a_sink_that_misbehaves_changes_nothing_else(alone: Trained, hook: str, how: str) -> None:
    trained = run(misbehaving(hook, how))
    assert trained.failed == (["misbehaving"] if MISBEHAVIOURS[how].fails else [])
    assert without_logs(trained.recorder) == without_logs(alone.recorder)
    for name, value in alone.weights.items():
        assert torch.equal(value, trained.weights[name])
    warnings = [event.message for event in trained.recorder.events("on_log") if event.name == "plugin_failed"]
    assert len(warnings) == MISBEHAVIOURS[how].fails
    for warning in warnings:
        assert re.fullmatch(
            rf"plugin misbehaving \(.*\) failed in {hook}( at step \d)?: .*; it is switched off", warning
        )
        assert warning.count("plugin misbehaving") == 1
        assert (" at step " in warning) == hasattr(HOOKS[hook].event, "step")


@pytest.mark.parametrize(
    ("hook", "how"),
    [(hook, how) for hook, how in CASES if MISBEHAVIOURS[how].fails and (how == "raises" or hook == "on_step_end")],
)
def test_abort_ends_the_run_and_closes_all_plugins_once(hook: str, how: str) -> None:
    recorder = Recorder()
    plugin = misbehaving(hook, how, on_error="abort")
    with pytest.raises(PluginError, match=rf"plugin misbehaving .*{hook}"):
        run(plugin, recorder=recorder)
    assert recorder.hooks()[-2:] == ["on_run_error", "on_close"]
    assert recorder.hooks().count("on_close") == 1


@pytest.mark.parametrize(
    ("hook", "how"),
    [("register_components", how) for how in ("raises", "raises a BaseException", "raises a ConfigError", "exits")]
    + [("check_config", how) for how, fault in MISBEHAVIOURS.items() if fault.fails],
)
def test_before_the_run_a_failure_always_ends_it(hook: str, how: str) -> None:
    with pytest.raises(PluginError, match=rf"plugin misbehaving .*{hook}"):
        run(misbehaving(hook, how))
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


LEFT = {
    "gradients off": lambda: torch.set_grad_enabled(False),
    "the default dtype torch.float64": lambda: torch.set_default_dtype(torch.float64),
}


@pytest.mark.parametrize("what", LEFT)
@pytest.mark.parametrize("method", ["state_dict", "describe"])
def test_a_plain_method_that_leaves_torch_changed_has_failed(alone: Trained, method: str, what: str) -> None:
    def act(self: Any) -> dict[str, int]:
        LEFT[what]()
        return {"a": 1}

    trained = run(type("Leaves", (Plugin,), {method: act}))
    assert trained.failed == ["leaves"]
    assert all(torch.equal(value, trained.weights[name]) for name, value in alone.weights.items())
    (warning,) = [event.message for event in trained.recorder.events("on_log") if event.name == "plugin_failed"]
    assert re.fullmatch(rf"plugin leaves .* failed in {method}: .*{what}.*", warning)


class Odd(BaseException):
    """As a cancelled task or a panic of a native library, and its message cannot be shown."""

    def __str__(self) -> str:
        raise ValueError


STATES: dict[str, Callable[[], Any]] = {
    "a sparse tensor": lambda: torch.eye(2).to_sparse(),
    "a compressed tensor": lambda: torch.eye(2).to_sparse_csr(),
    "a quantized tensor": lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
    "a tensor without values": lambda: torch.empty(2, device="meta"),
    "a number of 5,000 digits": lambda: 10**5000,
    "a key beyond UTF-8": lambda: {"\udcff": torch.ones(1)},
}


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("what", STATES)
def test_a_state_that_no_file_holds_fails_its_plugin(what: str) -> None:
    trained = run(type("Holds", (Plugin,), {"state_dict": lambda self: {"a": STATES[what]()}}))
    assert trained.failed == ["holds"]
    assert trained.result.checkpoint_path is not None
    (warning,) = [event.message for event in trained.recorder.events("on_log") if event.name == "plugin_failed"]
    assert "plugin holds " in warning
    assert "failed in state_dict: " in warning


@pytest.mark.parametrize("method", ["__init__", "state_dict", "load_state_dict", "describe", "register_components"])
def test_a_base_exception_in_a_method_names_the_plugin(method: str, tmp_path: Path) -> None:
    def act(self: Any, *arguments: Any) -> None:
        raise Odd

    first = type("Acts", (Plugin,), {"state_dict": lambda self: {"a": 1}})
    marked: Any = classmethod(hookimpl(lambda cls, registry: act(cls))) if method == "register_components" else act
    acts = type("Acts", (first,), {method: marked, "on_error": "abort"})
    train(first, output_dir=tmp_path, max_steps=2)
    with pytest.raises(PluginError, match=rf"plugin acts .*failed in {method}: Odd: \(its message cannot be shown\)"):
        train(acts, output_dir=tmp_path, max_steps=4)


def test_load_state_dict_must_leave_torch_unchanged(tmp_path: Path) -> None:
    class Keeps(Plugin[Any]):
        def state_dict(self) -> dict[str, Any]:
            return {"a": 1}

        def load_state_dict(self, state: Any, version: int) -> None:
            torch.set_grad_enabled(False)

    run(Keeps, output_dir=tmp_path)
    with pytest.raises(PluginError, match=r"plugin keeps .*failed in load_state_dict: .*gradients off"):
        train(Keeps, output_dir=tmp_path, max_steps=4)


def test_an_import_that_changes_torch_does_not_reach_training(tmp_path: Path) -> None:
    """In a process of its own, because its state stays changed."""
    file = tmp_path / "odd.py"
    file.write_text(
        "import torch\nfrom gpt_simple import Plugin\n"
        "torch.set_default_device('meta')\ntorch.set_default_dtype(torch.float64)\n"
        "held = [torch.inference_mode(), torch.autocast('cpu', torch.bfloat16)]\n"
        "for mode in held:\n    mode.__enter__()\n"
        "class Odd(Plugin):\n    pass\n"
    )
    program = (
        "import sys, torch; from gpt_simple.testing import train\n"
        "without = train(max_steps=2).weights\nodd = train(max_steps=2, enable=(sys.argv[1],)).weights\n"
        "print(torch.empty(0).device.type, torch.get_default_dtype(), torch.is_grad_enabled(), "
        "torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu'))\n"
        "print(all(bool((value == odd[name]).all()) for name, value in without.items()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["meta torch.float64 False True True", "True"], done.stderr


@pytest.mark.parametrize("hook", ["on_step_end", "on_metrics", "on_checkpoint_saved", "evaluate"])
def test_a_model_that_is_left_in_another_mode_is_put_back(hook: str) -> None:
    """As a hook that samples and does not put the model back into training mode."""
    dropout = {"model.dropout": 0.5}

    def forget(self: Any, run: Any, event: Any) -> Any:
        run.model.train(hook == "evaluate")
        return {} if hook == "evaluate" else None

    trained = run(type("Forgets", (Plugin,), {hook: hookimpl(forget)}), overrides=dropout)
    without = train(max_steps=2, overrides=dropout)
    (warning,) = [event.message for event in trained.recorder.events("on_log") if event.name == "plugin_failed"]
    mode = "training" if hook == "evaluate" else "evaluation"
    assert f"LeftChanged: the process was left with the model in {mode} mode" in warning
    assert all(torch.equal(value, trained.weights[name]) for name, value in without.weights.items())


@pytest.mark.parametrize("name", ["config", "step", "tokens", "output_dir", "rank", "device"])
def test_a_plugin_cannot_write_attributes_of_the_run(name: str) -> None:
    class Writes(Plugin[Any]):
        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            setattr(run, name, 1)

    trained = run(Writes)
    assert trained.failed == ["writes"]
    assert trained.result.steps == 2


@pytest.mark.parametrize("how", [how for how, fault in MISBEHAVIOURS.items() if fault.fails])
def test_a_failure_while_closing_is_a_warning(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    trained = run(misbehaving("on_close", how, on_error="abort"))
    assert trained.result.status == "completed"
    assert re.search(r"plugin misbehaving .*on_close", capsys.readouterr().err)


@pytest.fixture(scope="module")
def alone_on_two() -> str:
    """The weights of the same run on two processes with no plugin that misbehaves."""
    first, second = train_on_ranks(max_steps=2)
    assert first.weights == second.weights
    return first.weights


@pytest.mark.parametrize("hook", [hook for hook in DURING if HOOKS[hook].ranks != "all"])
def test_misbehaviour_of_one_process_does_not_affect_the_other(alone_on_two: str, hook: str) -> None:
    """All misbehaviours at once, each in a plugin of its own."""
    plugins = [
        misbehaving(hook, how, rank=_culprit(hook), name=f"no_{index}", ranks="all", on_error="disable")
        for index, how in enumerate(MISBEHAVIOURS)
    ]
    first, second = train_on_ranks(*plugins, max_steps=2)
    assert (first.error, second.error) == ("", "")
    assert first.weights == second.weights == alone_on_two


def test_a_failure_on_another_process_is_in_the_log_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also one that both processes have, and one after the last decision, which is on stderr."""
    hooks = [hook for hook in DURING if HOOKS[hook].ranks == "plugin"]
    alone = [misbehaving(hook, "raises", rank=1, name=hook, ranks="all", on_error="disable") for hook in hooks]
    both = misbehaving("on_step_end", "raises", name="both", ranks="all", on_error="disable")
    outcomes = train_on_ranks(*alone, both, output_dir=tmp_path, max_steps=3)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = {row["plugin"]: row["message"] for row in rows if row.get("name") == "plugin_failed"}
    assert len(logged) == sum(row.get("name") == "plugin_failed" for row in rows)
    assert logged.pop("both").startswith("plugin both (")
    names = {hook.replace("_", ""): hook for hook in hooks}
    assert names.keys() - logged.keys() == {"onrunend"}
    logged["onrunend"] = capfd.readouterr().err
    for name, hook in names.items():
        assert re.search(rf"process 1: plugin {name} .*failed in {hook}.*; it is switched off", logged[name])


def test_describe_is_called_where_the_plugin_runs() -> None:
    class Described(Plugin[Any]):
        on_error = "abort"

        @hookimpl
        def on_run_start(self) -> None:
            self.started = True

        def describe(self) -> dict[str, Any]:
            return {"started": self.started}

    assert [outcome.error for outcome in train_on_ranks(Described, max_steps=2)] == ["", ""]


@pytest.mark.parametrize("hook", DURING)
@pytest.mark.parametrize("how", ["raises", "returns garbage"])
def test_if_one_process_ends_the_other_ends_and_says_why(hook: str, how: str) -> None:
    began = time.monotonic()
    culprit = _culprit(hook)
    outcomes = train_on_ranks(misbehaving(hook, how, rank=culprit, ranks="all"), max_steps=2)
    assert time.monotonic() - began < 30
    attribution = f"{'failed in ' if how == 'raises' else ''}{hook}"
    assert "plugin misbehaving" in outcomes[culprit].error
    assert attribution in outcomes[culprit].error
    other = outcomes[1 - culprit].error
    if culprit == 0:  # process 0 holds the store here, where a launcher's agent does otherwise
        assert other.startswith("RankFailed: ")
    elif hook not in ("on_eval_end", "on_run_end"):  # after these no process waits for another
        assert other.startswith(f"RankFailed: process {culprit} failed")


def _culprit(hook: str) -> int:
    """The process that misbehaves: not the main one, where the hook is called on others."""
    return 0 if HOOKS[hook].ranks == "main" else 1


def test_nothing_of_the_process_is_left_changed() -> None:
    threads = threading.active_count()
    for index, how in enumerate(MISBEHAVIOURS):
        run(misbehaving(("on_step_start", "on_batch", "evaluate")[index % 3], how))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")
    assert (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()) == (1, 0)
    assert (torch.get_default_dtype(), torch.empty(0).device.type) == (torch.float32, "cpu")
    assert threading.active_count() == threads


def test_an_entered_device_and_a_second_autocast_are_found() -> None:
    class Enters(Plugin[Any]):
        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            torch.device("meta").__enter__()

    class Doubles(Plugin[Any]):
        @hookimpl
        def evaluate(self, run: Any, event: Any) -> dict[str, Any]:
            torch.autocast("cpu", torch.bfloat16).__enter__()
            return {}

    trained = train(Enters, Doubles, max_steps=2, overrides={"training.mixed_precision": "bf16"})
    assert trained.failed == ["doubles", "enters"]
    assert torch.empty(0).device.type == "cpu"
    assert (torch.autocast_increment_nesting(), torch.autocast_decrement_nesting()) == (1, 0)


@pytest.mark.parametrize("mode", ["cpu", "meta"])
def test_a_default_device_below_an_entered_one_is_restored(mode: str) -> None:
    class Both(Plugin[Any]):
        @hookimpl
        def on_step_end(self) -> None:
            torch.set_default_device("meta")
            torch.device(mode).__enter__()

    trained = run(Both)
    (warning,) = [event.message for event in trained.recorder.events("on_log") if event.name == "plugin_failed"]
    assert f"LeftChanged: the process was left with the default device {mode}" in warning
    assert trained.failed == ["both"]
    assert torch.get_default_device().type == torch.empty(0).device.type == "cpu"
    assert not torch.overrides.has_torch_function((None,))


def test_no_plugin_can_change_what_another_receives() -> None:
    refused: list[str] = []

    class Aaa(Plugin[Any]):
        """Receives every event first."""

        before = ("metrics", "recorder")

        def try_on(self, value: Any) -> None:
            for change in (lambda: value.update(x=1), lambda: value.clear(), lambda: value.__setitem__("x", 1)):
                with pytest.raises(TypeError, match="cannot be changed"):
                    change()
            json.dumps(value)
            assert {**value} == value == copy.deepcopy(value)
            refused.append("yes")

        @hookimpl
        def on_run_start(self, run: Any, event: Any) -> None:
            self.try_on(event.facts)
            self.try_on(event.facts["data"])
            run.facts()["data"]["vocab_size"] = -1
            assert run.facts()["data"]["vocab_size"] > 0

        @hookimpl
        def on_metrics(self, run: Any, event: Any) -> None:
            self.try_on(event.metrics)

        @hookimpl
        def on_eval_end(self, run: Any, event: Any) -> None:
            self.try_on(event.metrics)

        @hookimpl
        def on_log(self, run: Any, event: Any) -> None:
            self.try_on(event.fields)

        @hookimpl
        def on_run_end(self, run: Any, event: Any) -> None:
            run.log.info("message", rows=[1])
            self.try_on(event.summary)
            self.try_on(event.summary["plugins"])

    assert run(Aaa).failed == []
    assert len(refused) >= 8


def test_the_failure_is_reported_and_not_the_changed_state() -> None:
    class Two(Plugin[Any]):
        @hookimpl
        def on_step_end(self, run: Any, event: Any) -> None:
            torch.set_grad_enabled(False)
            raise ValueError("the true cause")

    trained = run(Two)
    assert torch.is_grad_enabled()
    (warning,) = [event.message for event in trained.recorder.events("on_log") if event.name == "plugin_failed"]
    assert "ValueError: the true cause" in warning
