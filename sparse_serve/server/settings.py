"""Settings of the server: what is about this machine and this process, never about the model's results.

One frozen dataclass; its fields are the flags, the environment variables and the defaults, each written once. The order
of precedence is flag, then environment (`SPARSE_SERVE_<FIELD>`), then default. A value that does not parse, or an
environment variable that looks like ours but names no field, is an error: a typo must not become a default.

One exception: Kubernetes describes a Service to every container of its namespace in variables named after it, and one
called `sparse-serve`, or `sparse-serve-grpc`, gives them our prefix. They are told by their form and left alone.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sparse_serve.runtime.errors import SettingsError

ENV_PREFIX = "SPARSE_SERVE_"

_KUBERNETES = re.compile(
    ENV_PREFIX
    + r"""([A-Z0-9_]+_)? (
        SERVICE_HOST=.+ | SERVICE_PORT(_[A-Z0-9_]+)?=\d+
        | PORT(_\d+_(TCP|UDP|SCTP))?=(tcp|udp|sctp)://.+ | PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR)=.+
    )""",
    re.VERBOSE,
)
"""`VARIABLE=value` as Kubernetes injects it for a Service; a plain `SPARSE_SERVE_PORT=8000` is somebody's mistake."""


def _setting(default: Any, help_text: str, minimum: float | None = None, maximum: float | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text, "minimum": minimum, "maximum": maximum})


@dataclass(frozen=True)
class Settings:
    """How this process listens, drains and bounds requests."""

    host: str = _setting("127.0.0.1", "address both APIs listen on; 0.0.0.0 for every network of this machine")
    http_port: int = _setting(8000, "HTTP port (OpenAI API, metrics); 0 picks a free one", 0, 65535)
    grpc_port: int = _setting(50051, "gRPC port; 0 picks a free one", 0, 65535)
    drain_s: float = _setting(30.0, "seconds that running requests get to finish after SIGTERM or Ctrl-C", 0, 3600)
    max_message_bytes: int = _setting(8 << 20, "largest request that is read, in bytes", 1024, 1 << 30)
    max_stop: int = _setting(16, "most stop strings, and most stop token ids, of a gRPC request", 0, 1024)
    max_stop_bytes: int = _setting(256, "longest stop string of a gRPC request, in bytes of UTF-8", 1, 1 << 16)
    max_logprobs: int = _setting(20, "most top log-probabilities per position of a gRPC request", 0, 1024)
    reflection: bool = _setting(True, "answer gRPC reflection, so that tools can list the services")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add one flag per field. An absent flag stays absent from the namespace, so that it can be told from a
        given one."""
        group = parser.add_argument_group("settings", f"also read from the environment, as {ENV_PREFIX}<NAME>")
        for field in dataclasses.fields(cls):
            flag = "--" + field.name.replace("_", "-")
            options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
            if isinstance(field.default, bool):
                options["action"] = argparse.BooleanOptionalAction
            else:
                options |= {"metavar": type(field.default).__name__.upper(), "type": str}
            group.add_argument(flag, help=f"{field.metadata['help']} (default: {field.default})", **options)

    @classmethod
    def from_sources(cls, flags: Mapping[str, Any], environ: Mapping[str, str]) -> "Settings":
        """Build from parsed flags (`vars(namespace)`, other keys ignored) and the environment. Raises
        `SettingsError`."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for variable, text in environ.items():
            if not variable.startswith(ENV_PREFIX) or _KUBERNETES.fullmatch(f"{variable}={text}"):
                continue
            name = variable.removeprefix(ENV_PREFIX).lower()
            if name not in fields:
                known = ", ".join(ENV_PREFIX + known.upper() for known in fields)
                raise SettingsError(f"environment variable {variable} is not a setting; known: {known}")
            values[name] = _parse(fields[name], text, variable)
        for name, value in flags.items():
            if name in fields:
                flag = "--" + name.replace("_", "-")
                values[name] = _parse(fields[name], value, flag) if isinstance(value, str) else value
        return cls(**values)


_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def _parse(field: "dataclasses.Field[Any]", text: str, source: str) -> Any:
    kind: Callable[[str], Any] = type(field.default)
    try:
        return _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise SettingsError(f"{source} is {text!r}; expected {_expectation(field)}") from None


def _check(field: "dataclasses.Field[Any]", value: Any) -> None:
    minimum, maximum = field.metadata["minimum"], field.metadata["maximum"]
    kind = type(field.default)
    if kind is float and type(value) is int:
        kind = int
    in_range = type(value) is kind and (minimum is None or minimum <= value <= maximum)
    if not in_range or value == "":
        raise SettingsError(f"{field.name} is {value!r}; expected {_expectation(field)}")


def _expectation(field: "dataclasses.Field[Any]") -> str:
    minimum, maximum = field.metadata["minimum"], field.metadata["maximum"]
    kind = {int: "an integer", float: "a number", bool: "true or false", str: "a host name or address"}
    bounds = "" if minimum is None else f" from {minimum} to {maximum}"
    return f"{kind[type(field.default)]}{bounds}"
