from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from brokertask import App, ConfigurationError, Settings
from brokertask.settings import DEFAULT_URL, mask


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"BROKERTASK_{name.upper()}", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("name", "written", "expected"),
    [
        ("amqp_url", "amqps://user@host/vhost", "amqps://user@host/vhost"),
        ("namespace", "shop", "shop"),
        ("declare", "false", False),
        ("heartbeat", "60", 60),
        ("connect_timeout", "2.5", 2.5),
        ("publish_timeout", "1m", 60.0),
        ("grace", "1h30m", 5_400.0),
        ("grace", "", 60.0),
        ("max_payload_bytes", "2048", 2_048),
        ("results", "0", False),
        ("thread_limit", "7", 7),
    ],
)
def test_the_environment_is_read(
    monkeypatch: pytest.MonkeyPatch, name: str, written: str, expected: object
) -> None:
    monkeypatch.setenv(f"BROKERTASK_{name.upper()}", written)
    assert getattr(Settings(), name) == expected


def test_code_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKERTASK_NAMESPACE", "outer")
    assert Settings(namespace="inner").names.tasks == "inner.tasks"


def test_durations_in_code_are_what_durations_are_elsewhere() -> None:
    assert Settings(grace=timedelta(minutes=1)).grace == 60  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("amqp_url", "http://host"),
        ("declare", "perhaps"),
        ("heartbeat", "1"),
        ("heartbeat", "601"),
        ("connect_timeout", "soon"),
        ("grace", "-1"),
        ("max_payload_bytes", "1023"),
        ("max_payload_bytes", "16777217"),
        ("thread_limit", "0"),
    ],
)
def test_an_app_names_the_variable_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, name: str, written: str
) -> None:
    monkeypatch.setenv(f"BROKERTASK_{name.upper()}", written)
    with pytest.raises(ConfigurationError, match=f"BROKERTASK_{name.upper()}: "):
        App("a")


def test_a_wrong_namespace_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="namespace"):
        App("a", settings=Settings(namespace="a b"))


def test_a_misspelt_setting_in_code_is_refused() -> None:
    with pytest.raises(ValidationError, match="amqp_uri"):
        Settings(amqp_uri="amqp://host")  # type: ignore[call-arg]


def test_a_misspelt_variable_goes_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # The environment is asked only for what there is: the manual says so.
    monkeypatch.setenv("BROKERTASK_AMQP_URI", "amqp://elsewhere")
    assert Settings().broker_url() == DEFAULT_URL


def test_settings_do_not_change() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.namespace = "other"


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("amqp://user:secret@host/v", "amqp://user:***@host/v"),
        ("amqp://user:se:c@ret@host", "amqp://user:***@host"),
        ("amqp://:secret@host", "amqp://:***@host"),
        ("amqp://user@host:5672/v", "amqp://user@host:5672/v"),
        ("amqp://host", "amqp://host"),
        ("memory:", "memory:"),
    ],
)
def test_passwords_are_masked(url: str, masked: str) -> None:
    assert mask(url) == masked


@pytest.mark.parametrize("options", [{"amqp_url": "http://u:secret@h"}, {"heartbeat": "secret"}])
def test_no_error_quotes_what_it_was_given(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(**options)
    assert "secret" not in str(caught.value)


def test_without_a_url_a_broker_in_this_folder_is_used(tmp_path: Path) -> None:
    assert Settings().broker_url() == DEFAULT_URL
    (tmp_path / ".brokertask").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(".brokertask/dev.sock")
        assert Settings().broker_url() == "unix:.brokertask/dev.sock"
    assert Settings(amqp_url="memory:").broker_url() == "memory:"
