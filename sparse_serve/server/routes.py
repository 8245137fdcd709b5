"""Which paths of vLLM's HTTP application are answered: those that are meant for clients, and those asked for by flag.

vLLM has many more, such as `/tokenize`, `/invocations`, `/scale_elastic_ep` and `/docs`, and every release adds some.
"""

import os
import re
from collections.abc import Callable

from sparse_serve.runtime.errors import SettingsError

_CLIENTS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/models",
    "/health",
    "/metrics",
)
_RESPONSE = re.compile(r"/v1/responses/[A-Za-z0-9_-]+(/cancel)?")
_ADAPTERS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_ADAPTERS_VARIABLE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


def serving(extra_routes: str) -> Callable[[str], bool]:
    """Whether there is something at a path. `extra_routes` is the setting. Raises `SettingsError`."""
    if extra_routes == "all":
        return lambda path: True
    extra = [route.strip() for route in extra_routes.split(",") if route.strip()]
    for route in extra:
        if not route.startswith("/"):
            raise SettingsError(f"--extra-routes: {route!r} is no path; expected such as /tokenize,/detokenize, or all")
    if os.environ.get(_ADAPTERS_VARIABLE, "").lower() in ("1", "true"):
        extra.extend(_ADAPTERS)
    known = {*_CLIENTS, *extra}
    return lambda path: path in known or _RESPONSE.fullmatch(path) is not None
