"""Secrets are hidden wherever a text may hold them: command lines, messages, the causes of errors."""

from __future__ import annotations

import pytest

from gpt_simple.config.load import redacted_arguments
from gpt_simple.config.redact import hide_in_error, secrets_in, secrets_of_environment, spellings, without
from gpt_simple.errors import PluginError


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("--plugins.hook.password=X", "--plugins.hook.password=(redacted)"),
        ("--plugins.hook.password X --force", "--plugins.hook.password (redacted) --force"),
        ("--plugins.hook.api-key=X", "--plugins.hook.api-key=(redacted)"),
        ("--plugins.hook.auth.user=X", "--plugins.hook.auth.user=(redacted)"),
        ('--plugins.hook={password="X",every=3}', '--plugins.hook={password="(redacted)",every=3}'),
        ('--plugins.hook {"password":"X"}', '--plugins.hook {"password":"(redacted)"}'),
        ("--plugins.hook.url=https://me:X@host/y", "--plugins.hook.url=https://(redacted)@host/y"),
        ("train.py --api-key X api_token=X -v", "train.py --api-key (redacted) api_token=(redacted) -v"),
        ("run X.toml --data.tokenizer bytes --training.seed=3", "run X.toml --data.tokenizer bytes --training.seed=3"),
        ("--plugins.token.every 3", "--plugins.token.every 3"),
    ],
)
def test_a_command_line_shows_no_secret(given: str, shown: str) -> None:
    assert redacted_arguments(given.split()) == shown.split()


def test_every_spelling_of_a_secret_is_hidden() -> None:
    secrets = spellings(
        secrets_in({"password": 'pa"ss\\wörd/1', "pin": {"token": 1234}, "api_key": "a", "on": {"auth": True}})
    )
    for text in ('pa"ss\\wörd/1', repr({"p": 'pa"ss\\wörd/1'}), "?p=pa%22ss%5Cw%C3%B6rd%2F1", "1234", "key a!"):
        assert "(redacted)" in without(text, secrets), text
    assert without("a secret of one letter is a part of words", ["e"]) == "a secret of one letter is a part of words"


def test_secrets_of_the_environment() -> None:
    environ = {"WANDB_API_KEY": "0123456789", "AUTH": "1", "SSH_AUTH_SOCK": "/tmp/agent.1", "HOME": "/home/someone"}
    assert list(secrets_of_environment(environ)) == ["0123456789"]


def test_the_causes_of_an_error_hold_no_secret() -> None:
    cause = OSError(5, "sekret9 is refused")
    cause.add_note("with sekret9")
    error = PluginError("sekret9", hint="not sekret9")
    error.__cause__, cause.__context__ = cause, ExceptionGroup("both", [ValueError("sekret9", 1), error])
    hide_in_error(error, ["sekret9"])
    (value, _) = cause.__context__.exceptions
    assert "sekret9" not in f"{error} {error.problems} {cause} {cause.args} {cause.__notes__} {value}"
    assert value.args == ("(redacted)", 1)
