"""Settings of the server: what is about this machine and this process, never about the model's results.

A field of `Settings` is a flag, an environment variable (`SPARSE_SERVE_<FIELD>`) and a default, each written once. A
flag goes before the environment, which goes before the default. A value that does not parse, or an environment variable
that looks like one of these but names no field, is an error: a typo must not become a default.

One exception: Kubernetes describes a Service to every container of its namespace in variables named after it, and one
called `sparse-serve`, or `sparse-serve-grpc`, gives them the same prefix. They are recognised by their form and left
alone.
"""

import os
import re
from typing import Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

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


class Settings(BaseSettings):
    """How this process listens, drains and bounds requests.

    `Settings(**flags)` fills in the rest from the environment and the defaults. Raises `SettingsError`, which names
    the flag or the variable, its value, and what was expected.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="address both APIs listen on; 0.0.0.0 for every network of this machine",
    )
    http_port: int = Field(8000, ge=0, le=65535, description="HTTP port (OpenAI API, metrics); 0 picks a free one")
    grpc_port: int = Field(50051, ge=0, le=65535, description="gRPC port; 0 picks a free one")
    drain_s: float = Field(
        30.0, ge=0, le=3600, description="seconds that running requests get to finish after SIGTERM or Ctrl-C"
    )
    max_message_bytes: int = Field(8 << 20, ge=1024, le=1 << 30, description="largest request that is read, in bytes")
    max_stop: int = Field(
        16, ge=0, le=1024, description="most stop strings, and most stop token ids, of a gRPC request"
    )
    max_stop_bytes: int = Field(
        256, ge=1, le=1 << 16, description="longest stop string of a gRPC request, in bytes of UTF-8"
    )
    max_logprobs: int = Field(20, ge=0, le=1024, description="most top log-probabilities per position")
    reflection: bool = Field(True, description="answer gRPC reflection, so that tools can list the services")

    def __init__(self, **flags: Any) -> None:
        try:
            super().__init__(**flags)
        except ValidationError as error:
            raise SettingsError(_in_one_line(error, flags)) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment; no files."""
        return init_settings, _Environment(settings_cls)

    @field_validator("*", mode="before")
    @classmethod
    def _is_exact(cls, value: Any, info: ValidationInfo) -> Any:
        """Text is parsed; anything else has to be of the field's type, where pydantic would take True for a port."""
        assert info.field_name is not None
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, str) or type(value) is kind or (kind is float and type(value) is int):
            return value
        raise ValueError("the type is another")


class _Environment(EnvSettingsSource):
    """The environment, without what Kubernetes put there. Raises `SettingsError` for a variable that is no setting."""

    def __call__(self) -> dict[str, Any]:
        known = [ENV_PREFIX + name.upper() for name in self.settings_cls.model_fields]
        for variable in os.environ:
            is_meant = variable.upper().startswith(ENV_PREFIX) and not _is_of_kubernetes(variable)
            if is_meant and variable.upper() not in known:
                raise SettingsError(f"environment variable {variable} is not a setting; known: {', '.join(known)}")
        return super().__call__()

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        value, key, is_complex = super().get_field_value(field, field_name)
        return None if _is_of_kubernetes(ENV_PREFIX + field_name.upper()) else value, key, is_complex


def _is_of_kubernetes(variable: str) -> bool:
    return _KUBERNETES.fullmatch(f"{variable}={os.environ.get(variable, '')}") is not None


def _in_one_line(error: ValidationError, flags: dict[str, Any]) -> str:
    """The first wrong value: where it is from, what it is, and what was expected."""
    first = error.errors()[0]
    name = str(first["loc"][0])
    field = Settings.model_fields.get(name)
    if field is None:
        return f"{name} is not a setting; known: {', '.join(Settings.model_fields)}"
    source = "--" + name.replace("_", "-") if name in flags else ENV_PREFIX + name.upper()
    limits = {kind: getattr(rule, kind) for rule in field.metadata for kind in ("ge", "le") if hasattr(rule, kind)}
    kinds: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "a host name or address"}
    bounds = f" from {limits['ge']} to {limits['le']}" if limits else ""
    return f"{source} is {first['input']!r}; expected {kinds[field.annotation]}{bounds}"
