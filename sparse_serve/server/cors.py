"""Which pages a browser lets read an answer: CORS headers of answers that vLLM's application does not make itself.

vLLM gives its answers such headers, by `--allowed-origins` and `--allow-credentials`. What is refused before it would
have none, and a page would learn no more of a 401 or a 429 than that something went wrong. What a browser asks before
a request (a preflight) is answered as vLLM would, and before there is one: a page whose question fails never sees what
its request would have been told. Source: https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

EVERY = "*"


@dataclass(frozen=True)
class Cors:
    """Pages of the `origins` (`*`: of every origin) may read answers; with `credentials`, also those to requests that
    carry cookies. They may send these `methods` and `request_headers` (`*`: all)."""

    origins: Collection[str]
    credentials: bool = False
    methods: Collection[str] = (EVERY,)
    request_headers: Collection[str] = (EVERY,)

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

    def preflight(self, request: Headers) -> Response:
        """The answer to a preflight with these headers: 200, or 400 where the page may not do that."""
        made = CORSMiddleware(
            Response(),
            allow_origins=self.origins,
            allow_credentials=self.credentials,
            allow_methods=self.methods,
            allow_headers=self.request_headers,
        )
        return made.preflight_response(request)
