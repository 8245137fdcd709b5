"""Which extra of this project brings a package that is not installed.

The base installation prunes, learns and converts; serving is an extra. A verb that needs more than is there ends in one
line that says what to install.
"""

from sparse_serve.runtime.errors import SettingsError

SERVER = frozenset(
    {
        "google",
        "grpc",
        "grpc_health",
        "grpc_reflection",
        "httpx",
        "jsonschema",
        "prometheus_client",
        "pydantic_settings",
        "pythonjsonlogger",
        "starlette",
        "uvicorn",
        "uvloop",
        "yaml",
    }
)
"""Import names of what the extra `server` brings; `serve` and `cuda` bring an engine, too."""

ENGINE = "vllm"


def explain(error: ModuleNotFoundError, needs_engine: bool) -> SettingsError | None:
    """What to install, if `error` is about a package of an extra; None if it is anything else.

    `needs_engine`: whether what was asked for runs vLLM, which a client does not.
    """
    package = (error.name or "").partition(".")[0]
    if error.name == ENGINE or package in SERVER:
        extra = "'sparse-serve[serve]', or on machines with NVIDIA GPUs 'sparse-serve[cuda]'"
        install = extra if needs_engine else "'sparse-serve[server]'"
        return SettingsError(f"{package} is not installed; the extra for this is: pip install {install}")
    return None
