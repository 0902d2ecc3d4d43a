"""The environment variables: typed, and none misspelt in silence."""

from __future__ import annotations

import pytest

from autoparallel.errors import ConfigError
from autoparallel.settings import Settings, read_settings


def test_nothing_set() -> None:
    assert read_settings({"PATH": "/bin", "HOME": "/"}) == Settings()
    assert read_settings({"AUTOPARALLEL_WORKERS": "", "AUTOPARALLEL_DUMP": ""}) == Settings()


def test_all_set() -> None:
    environ = {"WORKERS": "3", "FLAVOR": "cpu:4", "DUMP": "out", "CACHE": "kept", "DEBUG": "1"}
    settings = read_settings({f"AUTOPARALLEL_{key}": value for key, value in environ.items()})
    assert settings == Settings(workers=3, flavor="cpu:4", cache="kept", dump="out", debug=True)


def test_reads_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPARALLEL_WORKERS", "0")
    assert read_settings().workers == 0


def test_variables_of_the_launcher_are_no_mistake() -> None:
    assert read_settings({"AUTOPARALLEL_LAUNCHER_PID": "7", "AUTOPARALLEL_OUTPUT_SOCKET": "x"}) == Settings()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("WORKER", "2", "did you mean AUTOPARALLEL_WORKERS"),
        ("flavour", "cpu:4", "did you mean AUTOPARALLEL_FLAVOR"),
        ("XYZZY", "1", "unset AUTOPARALLEL_XYZZY"),
        ("WORKERS", "-1", "from 0 to 9999"),
        ("WORKERS", "two", "from 0 to 9999"),
        ("WORKERS", "²", "from 0 to 9999"),
    ],
)
def test_mistakes_are_named(name: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_settings({f"AUTOPARALLEL_{name}": value})
