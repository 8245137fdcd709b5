"""Which pages a browser lets read an answer: CORS headers of answers that vLLM's application does not make itself.

vLLM gives its answers such headers, by `--allowed-origins` and `--allow-credentials`. What is refused before it would
have none, and a page would learn no more of a 401 or a 429 than that something went wrong. What a browser asks before
a request (a preflight) goes to vLLM. Source: https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers

EVERY = "*"


@dataclass(frozen=True)
class Cors:
    """Pages of the `origins` (`*`: of every origin) may read answers; with `credentials`, also those to requests that
    carry cookies."""

    origins: Collection[str]
    credentials: bool = False

    def headers(self, request: Headers) -> Mapping[str, str]:
        """Headers for the answer to a request; the origins that may not read it, and requests of no page, get none."""
        origin = request.get("origin")
        is_every = EVERY in self.origins
        if origin is None or not (is_every or origin in self.origins):
            return {} if is_every else {"vary": "Origin"}
        credentials = {"access-control-allow-credentials": "true"} if self.credentials else {}
        if is_every and not self.credentials:
            return {"access-control-allow-origin": EVERY}
        return {"access-control-allow-origin": origin, "vary": "Origin", **credentials}
