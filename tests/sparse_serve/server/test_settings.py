"""Settings: one definition for flags, environment and defaults; nothing wrong passes silently."""

import argparse
import os

import pytest

from sparse_serve.cli.settings import add_arguments, settings_of
from sparse_serve.runtime.errors import SettingsError
from sparse_serve.server.settings import Settings


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("SPARSE_SERVE_")]:
        monkeypatch.delenv(variable)


def from_flags(*flags: str, **environ: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environ.items():
            patch.setenv(variable, value)
        return settings_of(parser.parse_args(flags))


def test_flags_beat_the_environment_which_beats_defaults() -> None:
    settings = from_flags("--http-port", "1", SPARSE_SERVE_HTTP_PORT="2", SPARSE_SERVE_GRPC_PORT="3", PATH="/bin")
    assert (settings.http_port, settings.grpc_port, settings.host) == (1, 3, Settings().host)


def test_a_flag_equal_to_the_default_still_beats_the_environment() -> None:
    assert from_flags("--http-port", "8000", SPARSE_SERVE_HTTP_PORT="2").http_port == 8000


@pytest.mark.parametrize("word", ["0", "false", "No"])
def test_switches(word: str) -> None:
    assert from_flags().reflection
    assert not from_flags("--no-reflection").reflection
    assert not from_flags(SPARSE_SERVE_REFLECTION=word).reflection
    assert from_flags("--reflection", SPARSE_SERVE_REFLECTION=word).reflection


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        (["--http-port", "x"], {}, r"--http-port is 'x'; expected an integer from 0 to 65535"),
        (["--http-port", "65536"], {}, r"--http-port is '65536'; expected an integer from 0 to 65535"),
        (["--drain-s", "nan"], {}, r"--drain-s is 'nan'; expected a number from 0 to 3600"),
        (["--drain-s", "-1"], {}, r"--drain-s is '-1'"),
        (["--host", ""], {}, r"--host is ''; expected a host name"),
        ([], {"SPARSE_SERVE_MAX_STOP": "1025"}, r"SPARSE_SERVE_MAX_STOP is '1025'; expected an integer from 0 to 1024"),
        ([], {"SPARSE_SERVE_REFLECTION": "maybe"}, r"SPARSE_SERVE_REFLECTION is 'maybe'; expected true or false"),
        (
            [],
            {"SPARSE_SERVE_HTPP_PORT": "1"},
            r"SPARSE_SERVE_HTPP_PORT is not a setting; known: .*SPARSE_SERVE_HTTP_PORT",
        ),
    ],
)
def test_wrong_values_are_errors_that_say_what_was_expected(flags: list[str], environ: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        from_flags(*flags, **environ)


def test_types_are_strict_from_python_too() -> None:
    assert Settings(drain_s=3).drain_s == 3
    for wrong in ({"http_port": True}, {"http_port": 1.0}, {"reflection": 1}, {"host": None}, {"hots": "x"}):
        with pytest.raises(SettingsError, match=f"{next(iter(wrong))[:4]}.* (is .*; expected|is not a setting; known)"):
            Settings(**wrong)


@pytest.mark.parametrize(
    "line",
    [
        "SPARSE_SERVE_SERVICE_HOST=10.0.0.1",
        "SPARSE_SERVE_SERVICE_PORT=8000",
        "SPARSE_SERVE_SERVICE_PORT_HTTP_API=8000",
        "SPARSE_SERVE_PORT=tcp://10.0.0.1:8000",
        "SPARSE_SERVE_PORT_8000_TCP=tcp://10.0.0.1:8000",
        "SPARSE_SERVE_PORT_8000_TCP_PROTO=tcp",
        "SPARSE_SERVE_PORT_8000_TCP_PORT=8000",
        "SPARSE_SERVE_PORT_8000_TCP_ADDR=10.0.0.1",
        "SPARSE_SERVE_GRPC_SERVICE_HOST=10.0.0.1",
        "SPARSE_SERVE_GRPC_PORT=tcp://10.0.0.1:50051",
    ],
)
def test_what_kubernetes_says_about_a_service_of_our_name_is_not_for_us(line: str) -> None:
    variable, _, value = line.partition("=")
    assert from_flags(**{variable: value}) == Settings()


@pytest.mark.parametrize(
    "line", ["SPARSE_SERVE_PORT=8000", "SPARSE_SERVE_PORT_8000=1", "SPARSE_SERVE_SERVICE=x", "SPARSE_SERVE_HTTP_PORT=x"]
)
def test_what_only_looks_like_kubernetes_is_an_error(line: str) -> None:
    variable, _, value = line.partition("=")
    with pytest.raises(SettingsError, match=variable):
        from_flags(**{variable: value})


def test_the_variable_of_the_build_is_nobodys_mistake() -> None:
    assert from_flags(SPARSE_SERVE_NATIVE="off") == from_flags()
