"""Settings of the server: what is about this machine and this process, never about the model's results.

A field of `Settings` is a flag, an environment variable (`SPARSE_SERVE_<FIELD>`) and a default, each written once. A
flag goes before the environment, which goes before the default. A value that does not parse, or an environment variable
that looks like one of these but names no field, is an error: a typo must not become a default.

One exception: Kubernetes describes a Service to every container of its namespace in variables named after it, and one
called `sparse-serve`, or `sparse-serve-grpc`, gives them the same prefix. They are recognised by their form and left
alone.
"""

import ipaddress
import os
import re
import socket
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
    """How this process listens, whom it lets in, how it bounds requests, and how it drains.

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
    api_keys: str = Field(
        "", description="file of keys, one in each line, read again when it changes; clients send `Bearer KEY`"
    )
    admin_keys: str = Field(
        "",
        description="file of keys, as --api-keys, that open the gRPC service for operators; without, there is none",
    )
    tls_cert: str = Field("", description="certificate chain of both APIs (PEM), read again when it changes")
    tls_key: str = Field("", description="its key (PEM, no passphrase)")
    tls_client_ca: str = Field(
        "", description="authorities (PEM), one of which has to have signed a client's certificate"
    )
    insecure: bool = Field(False, description="listen on a --host that other machines reach, with neither keys nor TLS")
    extra_routes: str = Field(
        "", description="more paths of vLLM's HTTP API to answer, such as /tokenize,/detokenize; or all"
    )
    verify_digests: bool = Field(
        False, description="read the whole checkpoint at the start and compare it with the digests in its manifest"
    )
    allow_zero_weights: bool = Field(
        False, description="serve a model though a whole matrix of it, or a norm, is zeros, or all its logits are equal"
    )
    access_log: bool = Field(False, description="log a line for each request: its id, client, code and time")
    log_json: bool = Field(False, description="log in JSON, a line each; lines of vLLM itself stay as they are")
    drain_s: float = Field(
        30.0, ge=0, le=3600, description="seconds that running requests get to finish after SIGTERM or Ctrl-C"
    )
    watchdog_s: float = Field(
        120.0,
        ge=0,
        le=86400,
        description="seconds without a step of the engine, which is asked for one, until it is given up; 0: never",
    )
    restarts: int = Field(
        0, ge=0, le=1000, description="how often a server whose engine has died or hangs starts again instead of ending"
    )
    max_num_queued_reqs: int = Field(
        512, ge=1, le=1 << 20, description="most sequences that run or wait, of all clients; the next are refused"
    )
    max_num_queued_tokens: int = Field(
        1 << 18, ge=1, le=1 << 30, description="prompt tokens waiting to be read from which on requests are refused"
    )
    preemption: bool = Field(
        True,
        description="let a sequence that is due take the place of one that runs and is due later, which goes on then",
    )
    max_sequences: int = Field(128, ge=1, le=1 << 16, description="most sequences (prompts times n) of a request")
    max_sequences_per_client: int = Field(
        128,
        ge=1,
        le=1 << 20,
        description="most sequences that one client may have running: one key, or without keys one connection",
    )
    max_connections: int = Field(4096, ge=1, le=1 << 20, description="most connections of the HTTP port")
    max_streams: int = Field(256, ge=1, le=1 << 16, description="most calls at a time of a gRPC connection")
    messages_per_s: int = Field(
        1000,
        ge=0,
        le=1 << 20,
        description="messages of all streams a second, beyond which one holds several tokens; 0: a token each",
    )
    max_connection_age_s: float = Field(
        3600.0, ge=1, le=1e9, description="age at which a gRPC connection is closed, once its calls have ended"
    )
    header_s: float = Field(10.0, gt=0, le=3600, description="seconds a client gets to send the header of a request")
    body_s: float = Field(30.0, gt=0, le=3600, description="seconds it gets to send the body")
    write_s: float = Field(20.0, gt=0, le=3600, description="seconds it may leave an answer unread")
    max_header_bytes: int = Field(64 << 10, ge=1024, le=1 << 20, description="largest header of an HTTP request")
    max_message_bytes: int = Field(8 << 20, ge=1024, le=1 << 30, description="largest request that is read, in bytes")
    max_stop: int = Field(16, ge=0, le=1024, description="most stop strings, and most stop token ids, of a request")
    max_stop_bytes: int = Field(256, ge=1, le=1 << 16, description="longest stop string, in bytes of UTF-8")
    max_grammar_bytes: int = Field(
        64 << 10, ge=1, le=1 << 24, description="largest JSON schema, grammar or list of choices of a request"
    )
    max_regex_bytes: int = Field(4 << 10, ge=1, le=1 << 20, description="longest regular expression of a request")
    max_choices: int = Field(1024, ge=1, le=1 << 20, description="most choices of a request")
    max_logprobs: int = Field(20, ge=0, le=1024, description="most top log-probabilities per position")
    smg: bool = Field(
        False, description="answer vllm.grpc.engine.VllmEngine on the gRPC port, too, for routers such as SMG and llm-d"
    )
    untested_vllm: bool = Field(False, description="serve with a version of vLLM that this release was not tested with")
    reflection: bool = Field(True, description="answer gRPC reflection, so that tools can list the services")

    def __init__(self, **flags: Any) -> None:
        try:
            super().__init__(**flags)
        except ValidationError as error:
            raise SettingsError(_in_one_line(error, flags)) from None
        self._check_access()

    def _check_access(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise SettingsError("--tls-cert and --tls-key belong together; give both")
        if self.tls_client_ca and not self.tls_cert:
            raise SettingsError("--tls-client-ca needs --tls-cert and --tls-key")
        if not (self.api_keys or self.tls_cert or self.insecure or _is_loopback(self.host)):
            raise SettingsError(
                f"--host {self.host} lets other machines in: give --api-keys FILE, or --tls-cert and --tls-key (with "
                "--tls-client-ca to let in who has a certificate), or --insecure where something in front does that"
            )

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


_OF_THE_BUILD = ENV_PREFIX + "NATIVE"
"""Read by setup.py; it may still be set when a server starts."""


class _Environment(EnvSettingsSource):
    """The environment, without what Kubernetes put there. Raises `SettingsError` for a variable that is no setting."""

    def __call__(self) -> dict[str, Any]:
        known = [ENV_PREFIX + name.upper() for name in self.settings_cls.model_fields]
        for variable in os.environ:
            is_other = variable == _OF_THE_BUILD or _is_of_kubernetes(variable)
            is_meant = variable.upper().startswith(ENV_PREFIX) and not is_other
            if is_meant and variable.upper() not in known:
                raise SettingsError(f"environment variable {variable} is not a setting; known: {', '.join(known)}")
        return super().__call__()

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        value, key, is_complex = super().get_field_value(field, field_name)
        return None if _is_of_kubernetes(ENV_PREFIX + field_name.upper()) else value, key, is_complex


def _is_loopback(host: str) -> bool:
    """Whether nothing but this machine reaches `host`. A name that is not known counts: it cannot be listened on."""
    try:
        found = {ipaddress.ip_address(str(entry[4][0])) for entry in socket.getaddrinfo(host, None)}
    except (OSError, ValueError):
        return True
    return all(address.is_loopback for address in found)


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
    limits = {
        kind: getattr(rule, kind) for rule in field.metadata for kind in ("ge", "gt", "le") if hasattr(rule, kind)
    }
    kinds: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "a host name or address"}
    bounds = f" from {limits['ge']} to {limits['le']}" if "ge" in limits else ""
    bounds = f" above {limits['gt']}, at most {limits['le']}" if "gt" in limits else bounds
    return f"{source} is {first['input']!r}; expected {kinds[field.annotation]}{bounds}"
